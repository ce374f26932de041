"""AITER simulated over Triton's verbs, as on a GPU, on conformance cases; decodes are planned on the device."""

from __future__ import annotations

from typing import Any

import pytest

from polyradix.backend.capabilities import FEATURES, KV_GROUPS, Capabilities
from polyradix.backend.protocol import Memory
from polyradix_conformance.cases import all_cases
from polyradix_conformance.cases.kv_groups import Flow, moved
from polyradix_conformance.rig import Rig
from polyradix_conformance.runner import run_case
from polyradix_rocm.aiter.calls import Aiter
from polyradix_rocm.backend import AiterHost
from polyradix_rocm.ops import TritonAiterOps
from polyradix_rocm.simulator import Simulator
from polyradix_torch.gpu import TritonBackend

CASES = {case.id: case for case in all_cases()}
SIMULATED = {  # and what of AITER's it calls
    "L1/attend/decode/normal/bfloat16": "paged_attention_ragged",
    "L1/attend_latent/shape-deepseek/bfloat16": "mla_decode_fwd",
    "L1/moe/groups/bias/bfloat16": "biased_grouped_topk",
    "L1/add_rms_norm/normal/bfloat16": "rmsnorm2d_fwd_with_add",
    "L1/rms_norm/normal/float32": None,
}


class Interpreted(AiterHost, TritonBackend):
    def memory(self) -> Memory:
        return Memory(1 << 30, 1 << 31)


def opened() -> tuple[Any, Simulator]:
    dtypes, features = frozenset({"float32", "bfloat16"}), FEATURES | {KV_GROUPS}
    caps = Capabilities("rocm", "CPU", dtypes, (16,), 256, head_dim_multiple=2, features=features)
    simulator = Simulator("gfx942", "0.1.20")
    return Interpreted(caps, TritonAiterOps(Aiter(simulator)), "cpu"), simulator


@pytest.mark.usefixtures("exact")
def test_groups() -> None:
    """A window's decode is planned on the device, for its own group."""
    backend, simulator = opened()
    moved(Flow(Rig(backend, "bfloat16"), 128))
    assert {"paged_attention_ragged", "mha_batch_prefill_func"} <= set(simulator.calls)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("case", "called"), SIMULATED.items())
def test_case(case: str, called: str | None) -> None:
    backend, simulator = opened()
    result = run_case(CASES[case], lambda tp: backend)
    assert result.status == "pass", result.detail
    assert called is None or called in simulator.calls, simulator.calls
