"""`conform perf`: formulas, the quick oracle against the plain one, outcomes. Nothing depends on the time measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import pytest

from polyradix.backend import null, numpy
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.protocol import Heads
from polyradix_conformance import oracle, report
from polyradix_conformance.cli import main
from polyradix_conformance.oracle import SampleRow
from polyradix_conformance.perf import cli, cost, output, roofline, truth
from polyradix_conformance.perf.cases import SIZES, PerfCase, cases
from polyradix_conformance.perf.cost import Cost
from polyradix_conformance.perf.measure import Measured, Timing, _timing, measure, timed
from polyradix_conformance.perf.program import Shape, Subject
from polyradix_conformance.perf.subjects import Scale
from polyradix_conformance.report import seal

SMALL = {dtype: cases("small", dtype) for dtype in ("float32", "bfloat16")}
QUICK = 1e-6  # seconds of timing: the least number of chains


def case_of(part: str, dtype: str = "bfloat16") -> PerfCase:
    return next(c for c in SMALL[dtype] if part in c.id)


def test_costs_by_hand() -> None:
    heads = Heads(4, 2, 8)
    assert cost.linear(3, 5, 7, 2) == Cost(2 * (5 * 7 + 3 * 5 + 3 * 7), 2 * 3 * 5 * 7)
    assert cost.linear(3, 5, 7, 2, 4) == Cost(2 * (5 * 7 + 3 * 5) + 4 * 3 * 7, 2 * 3 * 5 * 7)
    # 2 sequences, 1 new token of 10: k and v of 10 rows of 16; q and out of 32, k and v in and written of 16
    assert cost.attend(2, 1, 10, heads, 2) == Cost(2 * 2 * (2 * 10 * 16 + 2 * 32 + 4 * 16), 2 * 10 * 4 * 32)
    assert cost.rms_norm(3, 8, 2) == Cost(2 * (24 + 24 + 8), 4 * 24)
    assert cost.add_rms_norm(3, 8, 2) == Cost(2 * (4 * 24 + 8), 5 * 24)
    assert cost.rope(3, heads, 2) == Cost(2 * 2 * 3 * 6 * 8 + 3 * 8 * 4, 3 * 3 * 6 * 8)
    assert cost.gated(3, 8, 2) == Cost(2 * (2 * 24 + 24), 4 * 24)
    assert cost.sample(3, 100) == Cost(1200, 300)


@pytest.mark.parametrize(("new", "context"), [(1, 1), (1, 9), (4, 4), (3, 11)])
def test_pairs_of_causal_attention_are_counted(new: int, context: int) -> None:
    pairs = sum(key <= query for query in range(context - new, context) for key in range(context))
    assert cost.seen(2, new, context) == 2 * pairs


def test_step_is_the_sum_of_its_parts() -> None:
    """Weights, cache and logits; a dense layer of hidden 8, inner 12, and heads 4/2 of 8."""
    heads, weights = Heads(4, 2, 8), 64 * 8 + 8 * 32 + 24 * 8 + 8 * 12
    made = cost.step(3, 10, heads, 2, weights, 8, 100, 2)
    linears = 2 * sum(cost.linear(3, k, n, 2).flops for k, n in ((8, 64), (32, 8), (8, 24), (12, 8)))
    attention, head = 2 * cost.attend(3, 1, 10, heads, 2).flops, cost.linear(3, 8, 100, 2, 4)
    assert made.flops == linears + attention + head.flops
    assert made.bytes == 2 * 2 * (weights + 2 * 3 * 10 * 16) + head.bytes


def test_quick_sampling_allows_the_same_tokens() -> None:
    r = np.random.default_rng(1)
    for seed in range(60):
        x = r.normal(size=200).astype(np.float32) * 2
        x[[3, 50]] = 5.0
        row = SampleRow((0.0, 0.7)[seed % 3 > 0], (0, 20)[seed % 2], (1.0, 0.8)[seed % 5 > 1], 0.01, seed, 7 * seed)
        assert truth.sample(x, row) == oracle.sample(x, row)


def test_layers_overflow_caches_within_reason() -> None:
    scale = Scale(flush=100, depth=8)
    assert [scale.layers(b) for b in (1000, 50, 30, 1)] == [1, 2, 4, 8]
    assert [scale.streams(b) for b in (1000, 50, 30, 1)] == [True, True, True, False]


def test_serving_cases_have_unique_ids_and_probes_for_both_ceilings() -> None:
    for size in SIZES:
        made = cases(size, "bfloat16")
        assert len({c.id for c in made}) == len(made) > 30
        assert [c.probe for c in made].count("compute") == 1
        assert all(c.streams for c in made if c.probe == "read")
        assert {c.id.split("/")[1] for c in made} == {
            "linear", "logits", "copy_pages", "export_pages", "attend", "rms_norm", "add_rms_norm", "gated", "rope",
            "sample", "step",
        }  # fmt: skip


@pytest.mark.parametrize("dtype", SMALL)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_numpy_is_right_after_the_timing(dtype: str, asynchronous: bool) -> None:
    backend = numpy.entry.create(async_launch=asynchronous)
    for case in SMALL[dtype]:
        m = measure(backend, dtype, case, QUICK)
        assert (m.status, case.id) == ("pass", case.id), m.detail
        assert m.timing is not None
        assert m.timing.sure > 0


class ZerosLater(NumpyBackend):
    """The first launches of each step are right, then only zeros come, as from a capture whose buffers went stale."""

    def __init__(self) -> None:
        super().__init__("float32", False)

    def compile(self, step: Any, limits: Any) -> Any:
        run, calls = super().compile(step, limits), 0

        def broken(params: Any, kv: Any, meta: Any) -> Any:
            nonlocal calls
            calls += 1
            out, kv = run(params, kv, meta)
            return (out if calls <= 3 else np.zeros_like(out)), kv

        return broken

    def sample(self, logits: Any, batch: Any) -> Any:
        self._samples = getattr(self, "_samples", 0) + 1
        out = super().sample(logits, batch)
        return out if self._samples <= 3 else np.zeros_like(out)

    def copy_pages(self, kv: Any, src: Any, dst: Any) -> Any:
        self._copies = getattr(self, "_copies", 0) + 1
        return super().copy_pages(kv, src if self._copies <= 3 else src[::-1], dst)

    def export_pages(self, kv: Any, pages: Any) -> Any:
        self._exports = getattr(self, "_exports", 0) + 1
        return super().export_pages(kv, pages if self._exports <= 3 else pages[::-1])


def test_outputs_that_go_wrong_during_the_timing_are_caught() -> None:
    for case in SMALL["bfloat16"]:
        m = measure(ZerosLater(), "bfloat16", case, QUICK)
        assert (m.status, case.id) == ("fail", case.id), m.detail


def test_null_is_wrong_everywhere() -> None:
    backend = null.entry.create()
    made = [measure(backend, "float32", c, QUICK) for c in SMALL["float32"]]
    assert {m.status for m in made} <= {"fail", "error"}
    assert roofline.find(made, None, None).read == 0


def test_what_is_not_claimed_or_declined_is_unsupported_and_an_exception_is_an_error() -> None:
    class Declines(NumpyBackend):
        def copy_pages(self, kv: Any, src: Any, dst: Any) -> Any:
            raise Unsupported("copy_pages")

        def memory(self) -> Any:
            return type(super().memory())(free=1000, total=1000)

    backend = Declines("float32", False)
    found = measure(backend, "float16", case_of("linear"), QUICK)
    assert found.status == "unsupported"
    assert "float16" in found.detail
    found = measure(backend, "bfloat16", case_of("attend"), QUICK)
    assert found.status == "unsupported"
    assert "memory" in found.detail
    broken = PerfCase("P/x", Cost(1, 1), lambda rig: 1 / 0)  # type: ignore[arg-type, return-value]
    found = measure(backend, "bfloat16", broken, QUICK)
    assert (found.status, found.timing) == ("error", None)
    assert "ZeroDivisionError" in found.detail


def test_the_step_around_a_verb_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a launch moves: 5 s of a step, 2 s for each of its 3 calls, 1 s for the fetch."""
    now = 0.0

    def chain(step: float) -> Callable[[int], Any]:
        def launch(times: int) -> Any:
            nonlocal now
            now += 1 + times * step
            return np.zeros(1)

        return launch

    monkeypatch.setattr("polyradix_conformance.perf.measure.time.perf_counter", lambda: now)
    subject = Subject(chain(5 + 3 * 2), lambda got: None, 3, chain(5))
    assert timed(subject, 1.0)[0] == Timing(2.0, 2.0)
    assert timed(Subject(chain(5.0), lambda got: None), 1e6)[0].median == pytest.approx(5 + 1 / 64)
    slow = timed(Subject(chain(4.0), lambda got: None, 4, chain(5.0)), 1.0)[0]
    assert slow.median == (1 + 4) / 4
    assert "too quick" in slow.remark


def test_noise_is_remarked_on_and_never_flatters() -> None:
    """A median is trusted when chains agree; else only the quickest chain counts, with the step around the call."""
    assert _timing([10.0, 10.2, 10.1], [2.0, 2.1, 2.05], 1).sure == pytest.approx(10.1 - 2.05)
    jumpy = _timing([10.0, 20.0, 21.0], [2.0, 12.0, 13.0], 2)
    assert (jumpy.median, jumpy.sure) == (4.0, 5.0)
    assert jumpy.remark == "noisy: off by up to 250%"


def measured(id: str, bytes: int, flops: int, seconds: float, **changes: Any) -> Measured:
    status = changes.pop("status", "pass")
    case = PerfCase(id, Cost(bytes, flops), lambda rig: None, **changes)  # type: ignore[arg-type, return-value]
    return Measured(case, status, Timing(2 * seconds, seconds))


def test_ceilings_come_from_probes_and_are_raised_when_beaten() -> None:
    probe = measured("probe", 10_000_000_000, 0, 1.0, streams=True, probe="read")
    dots = measured("dots", 1, 50_000_000_000, 1.0, probe="compute")
    close = measured("close", 10_400_000_000, 0, 1.0, streams=True)
    cached = measured("cached", 90_000_000_000, 0, 1.0)
    wrong = measured("wrong", 99_000_000_000, 99_000_000_000, 1.0, streams=True, status="fail")
    found = roofline.find([probe, dots, close, cached, wrong], None, None)
    assert (found.read, found.flops) == (10.0, 50.0)
    assert found.how == ("reads: probe probe", "operations: probe dots")
    better = measured("better", 12_000_000_000, 0, 1.0, streams=True)
    found = roofline.find([probe, dots, better], None, None)
    assert found.read == 12.0
    assert "raised from 10" in found.how[0]
    assert "better" in found.how[0]
    found = roofline.find([probe, dots], 8.0, 100.0)
    assert (found.read, found.flops) == (8.0, 100.0)
    assert "exceeded by probe" in found.how[0]
    assert roofline.find([wrong], None, None).how[0] == "reads: unknown, nothing was measured"


def test_share_is_of_the_ceiling_that_binds() -> None:
    ceilings = roofline.Ceilings(10.0, 100.0, ("", ""))
    memory = output.entry(measured("m", 5_000_000_000, 10_000_000_000, 1.0), ceilings)
    assert (memory["bound"], memory["share"]) == ("memory", 0.25)
    compute = output.entry(measured("c", 1_000_000_000, 80_000_000_000, 1.0), ceilings)
    assert (compute["bound"], compute["share"]) == ("compute", 0.4)
    assert output.entry(measured("w", 1, 1, 1.0, status="fail"), ceilings)["share"] is None


def run_perf(tmp_path: Path, *args: str) -> tuple[int, dict[str, Any]]:
    path = tmp_path / "perf.json"
    code = main(["perf", "--backend", "numpy", "--size", "small", "--seconds", str(QUICK), "-o", str(path), *args])
    return code, json.loads(path.read_text())


def test_command_writes_a_table_and_a_sealed_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, made = run_perf(tmp_path, "--only", "norm")
    assert code == 0
    schema = json.loads((Path(report.__file__).parent / "schema" / "perf-1.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(made)
    assert made["digest"] == seal(made)["digest"]
    assert made["partial"]
    assert all("norm" in c["id"] and c["status"] == "pass" for c in made["cases"])
    assert made["ceilings"]["read_gb_s"] > 0
    out = capsys.readouterr().out
    assert all(c["id"] in out for c in made["cases"])
    assert "linear" not in out.split("ceilings:")[0]
    assert "GB/s" in out


def test_given_ceilings_are_used_and_no_probe_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def spy(backend: Any, dtype: str, case: PerfCase, seconds: float) -> Measured:
        seen.append(case.id)
        return measure(backend, dtype, case, seconds)

    monkeypatch.setattr(cli, "measure", spy)
    code, made = run_perf(tmp_path, "--only", "gated", "--peak-bandwidth", "1e6", "--peak-flops", "2e6")
    assert code == 0
    assert all("gated" in id for id in seen)
    assert made["ceilings"] == {
        "read_gb_s": 1e6, "gflop_s": {"bfloat16": 2e6}, "how": "reads: given; operations: given",
    }  # fmt: skip
    case = made["cases"][0]
    assert case["share"] == pytest.approx(max(case["bytes"] / 1e6, case["flops"] / 2e6) / 1e9 / case["seconds"])


def test_wrong_outputs_make_the_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "open_backend", lambda name, **options: ZerosLater())
    code, made = run_perf(tmp_path, "--only", "gated")
    assert code == 1
    assert {c["status"] for c in made["cases"]} == {"fail"}
    assert "fail: after the timing: the error of row" in capsys.readouterr().out


def test_nothing_measured_makes_the_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def declines(*args: Any) -> Measured:
        return Measured(args[2], "unsupported")

    monkeypatch.setattr(cli, "measure", declines)
    assert run_perf(tmp_path)[0] == 1


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--backend", "nonesuch"], "device is 'nonesuch'"),
        (["--backend", "numpy", "--only", "nothing like it"], "no perf case has 'nothing like it' in its id"),
        (["--backend", "numpy", "--option", "compute=int8"], "compute is 'int8'"),
        (["--backend", "numpy", "--option", "compute"], "'compute' is not KEY=VALUE"),
        (["--backend", "numpy", "--seconds", "0"], "'0' is not a positive number"),
        (["--backend", "numpy", "--peak-flops", "nan"], "'nan' is not a positive number"),
        (["--backend", "numpy", "--size", "huge"], "huge"),
    ],
)
def test_bad_input_is_named(args: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "perf.json"
    path.write_text("of an earlier run")
    try:
        code = main(["perf", "-o", str(path), *args])
    except SystemExit as e:
        code = int(str(e.code))
    assert code == 2
    assert said in capsys.readouterr().err


def test_shape_picks_the_last_rows_of_three_sequences() -> None:
    shape = Shape(5, 3, 20)
    assert shape.checked == [0, 2, 4]
    assert shape.last_rows == [2, 8, 14]
    batch = shape.batch(shape.ragged(16))
    assert batch.last[shape.checked].tolist() == shape.last_rows
    assert batch.positions[shape.last_rows].tolist() == [19, 19, 19]
