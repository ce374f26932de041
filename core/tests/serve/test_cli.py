"""The command, as a person meets it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from polyradix.engine.config import EngineConfig
from polyradix.serve import cli

Command = Callable[..., subprocess.CompletedProcess[str]]


def process(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "polyradix.serve.cli", *args], capture_output=True, text=True, timeout=200
    )


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str]) -> Command:
    """As `process`, without a new interpreter; what its children write counts, too."""

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        try:
            code = cli.main(args)
        except SystemExit as end:  # argparse's
            code = int(end.code or 0)
        return subprocess.CompletedProcess(args, code, *capfd.readouterr())

    return run


def failed(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_version() -> None:
    assert process("--version").stdout == "polyradix 0.1.0\n"


def test_devices(command: Command) -> None:
    lines = command("devices").stdout.splitlines()
    assert {line.split()[0] for line in lines} >= {"null", "numpy"}


def test_work_that_is_interrupted_was_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_devices", interrupted)
    assert cli.main(["devices"]) == 130
    monkeypatch.setattr(cli, "_serve", interrupted)
    assert cli.main(["serve", "--model", "demo"]) == 0


@pytest.mark.parametrize(
    "flags",
    [
        "--model-path m --tp-size 2 --context-length 64 --max-running-requests 3",
        "--model m --tensor-parallel-size 2 --max-model-len 64 --max-num-seqs 3",
    ],
)
def test_flags_by_their_names_elsewhere(flags: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from polyradix.serve import run

    seen: list[EngineConfig] = []
    monkeypatch.setattr(run, "serve", lambda config, options: seen.append(config))
    assert cli.main(["serve", *flags.split(), "--max-num-batched-tokens", "128"]) == 0
    (config,) = seen
    assert (config.model, config.tp, config.max_context, config.max_seqs) == ("m", 2, 64, 3)
    assert config.max_tokens_per_step == 128


def test_port_in_use_is_said_before_the_model_is_looked_at(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error = failed(command("serve", "--model", "nonsense", "--port", str(port)))
    assert f"cannot listen on 127.0.0.1:{port}" in error
    assert "in use" in error


@pytest.mark.parametrize("host", ["256.0.0.1", "no.such.host.invalid"])
def test_bad_host(command: Command, host: str) -> None:
    assert f"cannot listen on {host}:0" in failed(command("serve", "--model", "x", "--host", host, "--port", "0"))


def test_missing_model() -> None:
    assert "no-such-folder" in failed(process("serve", "--model", "./no-such-folder", "--port", "0"))


def test_option_out_of_range(command: Command, model: Path) -> None:
    assert "max_seqs is 0" in failed(command("serve", "--model", str(model), "--max-seqs", "0", "--port", "0"))
    assert command("serve", "--model", str(model), "--dtype", "int7").returncode == 2


def test_options_of_the_backend(command: Command, model: Path) -> None:
    args = ("serve", "--model", str(model), "--load-format", "dummy", "--device", "numpy", "--port", "0")
    assert "'numpy' has no option 'speed'; it has: compute, async_launch" in failed(
        command(*args, "--option", "speed=9")
    )
    assert "compute is 'int7'" in failed(command(*args, "--option", "async_launch=1", "--option", "compute=int7"))
    bad = command(*args, "--option", "compute")
    assert bad.returncode == 2
    assert "'compute' is not KEY=VALUE" in bad.stderr


@pytest.mark.parametrize("name", ["serve", "check"])
def test_unknown_device_lists_the_found_ones(command: Command, model: Path, name: str) -> None:
    args = ("--port", "0") if name == "serve" else ()
    error = failed(command(name, "--model", str(model), "--load-format", "dummy", "--device", "warp", *args))
    assert "'warp'" in error
    assert "numpy" in error
    assert "null" in error


def test_check(command: Command, model: Path) -> None:
    args = ("check", "--model", str(model), "--load-format", "dummy", "--device", "numpy")
    good = command(*args)
    assert good.returncode == 0, good.stderr
    assert "can run" in good.stdout
    # 2 layers of (32+32)x32 qkv, 32x32 o, 3 x 64x32 mlp, 2 norms; embed and logits of 256x32, a norm, rope; 4 bytes
    assert f"{4 * (2 * (64 * 32 + 32 * 32 + 3 * 64 * 32 + 64) + 2 * 256 * 32 + 32 + 512 * 8):,} bytes" in good.stdout
    bad = command(*args, "--page-size", "7")
    assert bad.returncode == 1
    assert "page size 7" in bad.stdout


def test_check_forecasts(command: Command, model: Path, tmp_path: Path) -> None:
    """Ceilings of 1e9 bytes and of 1e9 operations a second: a step takes the larger of both numbers, in seconds."""
    file = tmp_path / "perf.json"
    file.write_text(json.dumps({"ceilings": {"read_gb_s": 1.0, "gflop_s": {"float32": 1.0}}}))
    args = ("check", "--model", str(model), "--load-format", "dummy", "--device", "numpy", "--context", "100")
    out = command(*args, "--ceilings", str(file), "--peak-flops", "2", "--seqs", "3", "--json")
    report = json.loads(out.stdout)
    assert report["ceilings"] == {"read_gb_s": 1.0, "gflop_s": 2.0, "source": f"given and {file}"}
    assert [(s["step"], s["seqs"], s["tokens"]) for s in report["steps"]] == [
        ("decode", 1, 1),
        ("decode", 3, 3),
        ("prefill", 1, 100),
    ]
    for s in report["steps"]:
        times = {"memory": s["bytes"] / 1e9, "compute": s["flops"] / 2e9}
        assert s["seconds"] == pytest.approx(max(times.values()))
        assert s["tokens_per_s"] == pytest.approx(s["tokens"] / max(times.values()))
        assert times[s["bound"]] == max(times.values())
    assert report["verbs"]["attend"] == "own"
    assert report["verbs"]["linear_gated"] == "expansion"
    assert report["kv_sequence"] == 7 * report["kv_page"]
    for bad, said in ((("--context", "513"), "context is 513; expected at most"), (("--peak-flops", "2"), "peak_band")):
        assert said in failed(command(*args, *bad))


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("polyradix.serve.run", ["torch", "jax", "transformers"]),
        ("polyradix.serve.cli, polyradix.engine.process", ["fastapi", "uvicorn", "starlette", "torch", "jax"]),
    ],
)
def test_processes_stay_apart(module: str, forbidden: list[str]) -> None:
    code = f"import {module}, sys; print(sorted(sys.modules.keys() & set({forbidden})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert done.stdout == "[]\n", done.stderr
