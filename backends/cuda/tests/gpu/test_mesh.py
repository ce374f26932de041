"""On two GPUs or more: the conformance cases of several ranks, an engine beside one GPU's, and a rank that dies."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "torch/tests"))

from mesh_engine import served

from polyradix.backend.capabilities import DeviceLost
from polyradix.backend.protocol import KVSpec, Limits, Params, ParamSpec
from polyradix.backend.registry import open_backend
from polyradix.engine.start import prefill
from polyradix_conformance.cases import Case, all_cases
from polyradix_conformance.runner import run_case

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are fewer than two GPUs")


@pytest.mark.conformance(backend="cuda", profile="mesh")
def test_mesh(conformance_case: Any) -> None:
    conformance_case.check()


@pytest.mark.conformance(backend="cuda", profile="mesh", options={"capture": 0})
def test_mesh_eager(conformance_case: Any) -> None:
    conformance_case.check()


OTHERS = [c for c in all_cases() if c.needs.tp > 1 and c.profile != "mesh"]


@pytest.mark.parametrize("case", OTHERS, ids=lambda c: c.id)
def test_experts_latents_and_sinks(case: Case, opened: Callable[[int], Any]) -> None:
    result = run_case(case, opened)
    assert result.status == ("pass" if case.needs.tp <= torch.cuda.device_count() else "unsupported"), result.detail


@pytest.fixture(scope="module")
def opened() -> Callable[[int], Any]:
    return cache(lambda tp: open_backend("cuda", tp=tp))


@pytest.mark.parametrize("capture", [1, 0])
def test_an_engine_gives_the_tokens_of_one_gpu(capture: int) -> None:
    """Two steps in flight, graphs of many sizes, shared prefixes, chunks, retractions; float32."""
    one, two = (served(open_backend("cuda", tp=tp, capture=capture), 48, 40) for tp in (1, 2))
    assert one == two


def test_a_rank_that_dies_ends_the_mesh_and_no_wait_is_for_ever() -> None:
    mesh: Any = open_backend("cuda", tp=2)
    spec = ParamSpec("w", "linear_reduce", (64, 64), "float32", (), 1)
    one = np.ones((64, 64), np.float32)
    top = {"w": mesh.pack(spec, lambda part="weight": one)}
    for name, kind, axis in (("up", "linear", 0), ("embed", "embed", None), ("out", "logits", 0)):
        top[name] = mesh.pack(ParamSpec(name, kind, (64, 64), "float32", (), axis), lambda part="weight": one)
    batch, pages = prefill(np.ones(4, np.int64), 16)

    def step(ops: Any, p: Params, kv: Any, m: Any) -> Any:
        x = ops.linear_reduce(ops.linear(ops.embed(p.top["embed"], m), p.top["up"]), p.top["w"])
        return ops.logits(ops.last(x, m), p.top["out"]), kv

    kv = mesh.alloc_kv(KVSpec(1, 2, 64, 16, "float32"), pages)
    run, params = mesh.compile(step, Limits(16, 8, 64)), Params(top, [])
    for _ in range(3):
        logits, kv = run(params, kv, mesh.prepare(batch))
    np.testing.assert_array_equal(mesh.fetch(logits).result(timeout=60), np.full((4, 64), 64.0**3, np.float32))
    mesh._others._all[0].process.send_signal(signal.SIGKILL)

    def go_on() -> None:
        for _ in range(100):
            mesh.fetch(run(params, kv, mesh.prepare(batch))[0]).result(timeout=60)

    start = time.monotonic()
    with pytest.raises(DeviceLost, match="rank 1 died: Killed"):
        go_on()
    assert time.monotonic() - start < 60
