"""`polyradix bench`: what it asks, what it counts, and both commands on a small model."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from polyradix.bench.measure import Event, Message, Sample, Slo, run, summary
from polyradix.bench.plot import svg
from polyradix.bench.workload import DatasetError, Sizes, Talk, talks
from polyradix.serve.cli import main

SMALL = [
    "--requests=3",
    "--input=8",
    "--output=5",
    "--vocab=256",
    "--prefix=32",
    "--prefixes=1",
    "--turns=2",
    "--concurrency=2",
]


def test_datasets() -> None:
    sizes = Sizes(requests=6, input=7, output=3, prefixes=2, prefix=20, turns=3, vocab=50)
    random, shared = talks("random", sizes), talks("shared-prefix", sizes)
    assert [len(t.prompt or "") for t in random] == [7] * 6
    assert len({str(t.prompt) for t in random}) == 6
    assert all(0 <= i < 50 for t in random for i in t.prompt or () if isinstance(i, int))
    assert len({str((t.prompt or [])[:20]) for t in shared}) == 2
    assert len({str(t.prompt) for t in shared}) == 6
    assert [len(t.turns) for t in talks("multi-turn", sizes)] == [3] * 6
    assert all(t.schema for t in talks("json", sizes))
    assert talks("random", sizes) == random != talks("random", Sizes(seed=1))


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "a", "max_tokens": 9}\n\n{"turns": ["b", "c"]}\n{"prompt": [1, 2]}\n')
    assert talks(str(path), Sizes(output=4)) == [Talk(9, "a"), Talk(4, turns=["b", "c"]), Talk(4, [1, 2])]
    for line in ("nonsense", "[]", "{}", '{"prompt": "a", "turns": ["b"]}'):
        path.write_text('{"prompt": "a"}\n' + line)
        with pytest.raises(DatasetError, match=r"x.jsonl:2"):
            talks(str(path), Sizes())
    with pytest.raises(DatasetError, match="random"):
        talks("none", Sizes())
    path.write_text("\n")
    with pytest.raises(DatasetError, match="no requests"):
        talks(str(path), Sizes())


@pytest.mark.parametrize(
    "flag",
    [
        "--concurrency=0",
        "--requests=-1",
        "--turns=0",
        "--rate=0",
        "--rate=nan",
        "--slo-itl=x",
        "--json=/nowhere/a.json",
    ],
)
def test_wrong_flags(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before anything runs: without one to run them, requests would wait for ever."""
    with pytest.raises(SystemExit):
        main(["bench", "serving", flag])
    name, _, value = flag.partition("=")
    said = capsys.readouterr().err
    assert f"argument {name}: {value!r}; expected" in said


def test_turns_and_concurrency() -> None:
    asked: list[list[Message]] = []
    at_once = most = 0

    async def ask(talk: Talk, messages: list[Message]) -> AsyncIterator[Event]:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        asked.append(list(messages))
        for part in ("x", "y"):
            await asyncio.sleep(0.01)
            yield Event(part, arrived=True)
        yield Event(output_tokens=2, prompt_tokens=len(messages))
        at_once -= 1
        if talk.output == 0:
            raise RuntimeError("refused")

    work = [Talk(1, turns=["a", "b"]), *[Talk(1, "p")] * 5, Talk(0, "bad")]
    samples = asyncio.run(run(ask, work, 3, None, 0))
    assert most == 3
    answer = {"role": "assistant", "content": "xy"}
    assert [{"role": "user", "content": "a"}, answer, {"role": "user", "content": "b"}] in asked
    assert [s.error for s in samples if s.error] == ["RuntimeError: refused"]
    assert {len(s.itl) for s in samples} == {1}
    assert all(s.seconds == pytest.approx(s.ttft + sum(s.itl)) for s in samples)
    assert asyncio.run(run(ask, [Talk(1, "p")] * 3, 3, 1000.0, 0))


def test_summary_by_hand() -> None:
    samples = [
        Sample(start=10.0, ttft=0.5, seconds=2.5, itl=[1.0, 1.0], output_tokens=3, prompt_tokens=10, cached_tokens=4),
        Sample(start=11.0, ttft=2.0, seconds=3.0, itl=[0.25] * 4, output_tokens=5, prompt_tokens=10),
        Sample(start=11.5, error="503"),
    ]
    found = summary(samples, Slo(ttft=1.0, itl=1.0))
    assert (found["requests"], found["failed"], found["first_error"]) == (3, 1, "503")
    assert found["seconds"] == 4.0  # from 10 to 14
    assert (found["requests_per_s"], found["output_tokens_per_s"], found["input_tokens_per_s"]) == (0.5, 2.0, 5.0)
    assert found["goodput_requests_per_s"] == 0.25
    assert summary(samples, Slo(itl=0.5))["goodput_requests_per_s"] == 0.25
    assert summary(samples, Slo())["goodput_requests_per_s"] == 0.5
    assert found["ttft_ms"] == {"mean": 1250.0, "p50": 1250.0, "p90": 1850.0, "p99": 1985.0}
    assert found["itl_ms"]["mean"] == 500.0
    assert found["cached_tokens"] == 4
    assert summary(samples[2:], Slo())["ttft_ms"] == {}


def test_plot() -> None:
    root = ET.fromstring(svg({"a & b": {"x": [1.0, 2.0, 4.0], "none": []}, "c": {}}))
    (line,) = root.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, p.split(","))) for p in line.attrib["points"].split()]
    assert points[0] == (85.0, 180.0)  # the least, a quarter of the width, at 0 %
    assert points[-1] == (340.0, 0.0)


@pytest.fixture(scope="module")
def model(byte_model: Callable[[int, str], Path]) -> Path:
    return byte_model(1, "{% for m in messages %}{{ m.content }}\n{% endfor %}")


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    args = ["serve", "--model", str(model), "--load-format", "dummy", "--device", "numpy", "--port", "0"]
    command = [sys.executable, "-m", "polyradix.serve.cli", *args, "--api-key", "k"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        line = next(line for line in server.stderr if "ready at" in line)
        yield line.partition("ready at ")[2].partition(": ")[0]
        server.terminate()
        server.communicate(timeout=30)


def bench(tmp_path: Path, *args: str) -> tuple[int, dict[str, Any]]:
    files = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg")]
    command = [sys.executable, "-m", "polyradix.serve.cli", "bench", *args, *SMALL, *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    summary = json.loads(done.stdout)
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["summary"] == summary
    assert len(report["requests"]) == summary["requests"]
    ET.parse(tmp_path / "out.svg")
    return done.returncode, summary


@pytest.mark.parametrize("dataset", ["random", "shared-prefix", "multi-turn"])
def test_serving_and_offline(dataset: str, model: Path, url: str, tmp_path: Path) -> None:
    engine = ["--model", str(model), "--load-format", "dummy", "--device", "numpy"]
    slo = ["--dataset", dataset, "--slo-ttft=100000", "--slo-itl=100000"]
    for args in (["serving", "--url", url, "--api-key", "k"], ["offline", *engine]):
        code, found = bench(tmp_path, *args, *slo)
        requests = 6 if dataset == "multi-turn" else 3
        assert (code, found["failed"], found["requests"]) == (0, 0, requests)
        assert found["output_tokens"] == 5 * requests
        assert found["goodput_requests_per_s"] == found["requests_per_s"] > 0
        assert found["ttft_ms"]["p50"] > 0
        assert (found["cached_tokens"] > 0) == (dataset != "random")
        if dataset == "random":
            assert found["input_tokens"] == 24


def test_failures_are_counted(url: str, tmp_path: Path) -> None:
    code, found = bench(tmp_path, "serving", "--url", url, "--api-key", "wrong", "--model", "x")
    assert (code, found["failed"], found["requests"]) == (1, 3, 3)
    assert found["first_error"].startswith("RuntimeError: 401")
