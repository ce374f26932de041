"""Two ranks over gloo: the conformance cases, what happens when one fails, and that nobody outlives rank 0."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from mesh_engine import served
from plain_backend import PlainBackend, frail, missing, plain

from polyradix.backend.capabilities import DeviceLost, Unsupported
from polyradix.backend.protocol import KVSpec, Limits, Memory, Params, ParamSpec, Quant
from polyradix.backend.quant import dequantise
from polyradix.backend.registry import check_drift
from polyradix_conformance.cases import Case, all_cases
from polyradix_conformance.runner import run_case
from polyradix_torch.mesh import Mesh, followers, gloo

CASES = [c for c in all_cases() if c.needs.tp == 2]
LIMITS = Limits(16, 4, 64)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    made = Mesh(plain, gloo, 2)
    yield made
    made._end()  # as when it is collected, or the interpreter ends


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_case(case: Case, mesh: Mesh) -> None:
    alone = PlainBackend()
    result = run_case(case, lambda tp: mesh if tp == 2 else alone)
    assert result.status == "pass", result.detail


def test_it_keeps_the_protocol(mesh: Mesh) -> None:
    check_drift("mesh", mesh)
    assert mesh.collectives.size == 2
    assert mesh.caps.notes[-1] == "tp 2, by gloo"


@pytest.mark.parametrize("format", ["fp8", "int4"])
def test_quantised_weights_are_split_where_their_blocks_are_not(mesh: Mesh, batch_of: Any, format: Any) -> None:
    rng = np.random.default_rng(5)

    def packed(kind: Any, shape: tuple[int, int], axis: int, block: tuple[int, int]) -> tuple[Any, Any]:
        quant, blocks = Quant(format, block), tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
        parts: Any = {"scale": rng.uniform(0.5, 1, blocks).astype(np.float32)}
        if format == "fp8":
            parts["weight"] = rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
        else:
            parts["weight"] = rng.integers(0, 256, (shape[0], shape[1] // 2)).astype(np.uint8)
            parts["zero"] = rng.integers(0, 16, blocks).astype(np.uint8)
        spec = ParamSpec("w", kind, shape, "float32", (), axis, quant=quant)
        return mesh.pack(spec, lambda part="weight": parts[part]), dequantise(quant, parts.__getitem__)

    (up, one), (down, two) = packed("linear", (12, 4), 0, (4, 4)), packed("linear_reduce", (2, 12), 1, (2, 8))
    top = {"e": ones(mesh, "e", "embed", (64, 4), None), "u": up, "d": down, "o": ones(mesh, "o", "logits", (3, 2), 0)}

    def step(ops: Any, p: Any, kv: Any, m: Any) -> Any:
        x = ops.linear_reduce(ops.linear(ops.embed(p.top["e"], m), p.top["u"]), p.top["d"])
        return ops.logits(ops.last(x, m), p.top["o"]), kv

    kv, batch = mesh.alloc_kv(KVSpec(1, 2, 8, 4, "float32"), 9), batch_of([(0, 3, [1])], 4)
    logits, _ = mesh.compile(step, LIMITS)(Params(top, []), kv, mesh.prepare(batch))
    want = (np.ones(4) @ one.T.astype(np.float64)) @ two.T.astype(np.float64)
    np.testing.assert_allclose(mesh.fetch(logits).result(), np.full((1, 3), want.sum()), rtol=1e-5)


def test_an_engine_gives_the_tokens_of_one_rank(mesh: Mesh) -> None:
    assert served(mesh, 6, 5) == served(PlainBackend(), 6, 5)


def test_a_device_that_is_not_there_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="rank 1: ValueError: there is no device 1"):
        Mesh(missing, gloo, 2)


def ones(mesh: Any, name: str, kind: Any, shape: tuple[int, int], axis: int | None) -> Any:
    spec = ParamSpec(name, kind, shape, "float32", (), axis)
    return mesh.pack(spec, lambda part="weight": np.ones(shape, np.float32))


def gate(mesh: Any, batch_of: Any) -> Any:
    """gate(kind) runs a step: a gated product, then a sum over ranks."""
    top = {
        "e": ones(mesh, "e", "embed", (64, 4), None),
        "d": ones(mesh, "d", "linear_reduce", (2, 4), 1),
        "o": ones(mesh, "o", "logits", (3, 2), 0),
    }
    params = Params(top, [])
    kv = mesh.alloc_kv(KVSpec(1, 2, 8, 4, "float32"), 9)
    batch = batch_of([(0, 3, [1])], 4)

    def run(kind: Any) -> Any:
        def step(ops: Any, p: Any, kv: Any, m: Any) -> Any:
            x = ops.linear_reduce(ops.gated(ops.embed(p.top["e"], m), kind), p.top["d"])
            return ops.logits(ops.last(x, m), p.top["o"]), kv

        logits, _ = mesh.compile(step, LIMITS)(params, kv, mesh.prepare(batch))
        return mesh.fetch(logits).result()

    return run


def test_errors(batch_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of all ranks, or of one before any exchange, is an error; one that parts the ranks is the end."""
    mesh = Mesh(frail, gloo, 2)
    assert mesh.memory() == Memory(9, 0)  # of rank 1, which has no weights yet
    run = gate(mesh, batch_of)
    assert mesh.memory() == Memory(9, 3)
    ones(mesh, "e", "embed", (1, 1), None)
    assert mesh.memory() == Memory(9, 3)  # what rank 0 has no more, nobody has
    with pytest.raises(MemoryError, match="rank 1: MemoryError: 10 pages"):
        mesh.alloc_kv(KVSpec(1, 2, 8, 4, "float32"), 10)
    with pytest.raises(Unsupported, match="gated"):
        run("relu")
    expected = 4 * 2 / (1 + np.exp(-1)) * np.ones((1, 3))
    assert np.allclose(run("silu"), expected)
    monkeypatch.setattr(followers, "PATIENCE", 1.0)
    with pytest.raises(DeviceLost, match="rank 1: RuntimeError: the gelu broke"):
        run("gelu_tanh")
    with pytest.raises(DeviceLost, match="the gelu broke"):
        run("silu")


LEADER = """
import sys
from plain_backend import plain
from polyradix_torch.mesh import Mesh, gloo

mesh = Mesh(plain, gloo, 2)
print(mesh._others._all[0].process.pid, flush=True)
sys.stdin.readline()
"""


def test_ranks_end_with_rank_0_however_it_ends() -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", LEADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as it:
        assert it.stdout is not None
        status = Path(f"/proc/{int(it.stdout.readline())}/status")
        it.kill()
    end = time.monotonic() + 60
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < end, "the process of rank 1 is still there"
        time.sleep(0.05)


def test_a_rank_that_dies_is_named(mesh: Mesh, batch_of: Any) -> None:
    """The last test: nothing can be done with the mesh afterwards."""
    run = gate(mesh, batch_of)
    run("silu")
    mesh._others._all[0].process.send_signal(signal.SIGKILL)
    with pytest.raises(DeviceLost, match="rank 1 died: Killed"):
        run("silu")
