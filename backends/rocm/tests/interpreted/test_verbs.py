"""AITER simulated over Triton's verbs, as on a GPU, on conformance cases; decodes are planned on the device."""

from __future__ import annotations

from typing import Any

import pytest

from polyradix.backend.capabilities import FEATURES, Capabilities
from polyradix.backend.protocol import Memory
from polyradix_conformance.cases import all_cases
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


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("case", "called"), SIMULATED.items())
def test_case(case: str, called: str | None) -> None:
    dtypes, features = frozenset({"float32", "bfloat16"}), FEATURES
    caps = Capabilities("rocm", "CPU", dtypes, (16,), 256, head_dim_multiple=2, features=features)
    simulator = Simulator("gfx942", "0.1.20")
    backend: Any = Interpreted(caps, TritonAiterOps(Aiter(simulator)), "cpu")
    result = run_case(CASES[case], lambda tp: backend)
    assert result.status == "pass", result.detail
    assert called is None or called in simulator.calls, simulator.calls
