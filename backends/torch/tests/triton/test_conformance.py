"""The Triton kernels on conformance cases, interpreted: right as they are, seen to be wrong when made so."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from interpreted_backend import Interpreted

from polyradix.backend.protocol import AttnSpec
from polyradix_conformance.cases import Case, all_cases
from polyradix_conformance.runner import run_case
from polyradix_torch.triton import attention

CHOSEN = (  # by subject; the interpreter is slow
    r"L1/(embed|last|qkv|rms_norm|qk_norm|rope/normal|gated|add|linear_gated|logits|sample|logprobs)",
    r"L1/attend/(mixed/(normal|window-7|softcap)|decode/(peaked|window-40)|dim-80)/",
    r"L1/attend/((heads-mqa|dim-256|page-128)/bfloat16|page-1/float32)",
    r"L1/attend/(decode/sinks|mixed/sinks-window-softcap)/bfloat16",
    r"L1/kv_groups/chunked/bfloat16",
    r"L2/(copied|linked|exported_then_written)",
    r"L1/quant/(linear/(fp8-block|int4-group-32)/|(linear/bias/int4-group-64|linear_gated/fp8-channel)/bfloat16)",
    r"L1/quant/moe/fp8-block/bfloat16",
    r"(L1/kv_fp8/mixed/bfloat16|L2/kv_fp8/(written/bfloat16|size))",
    r"L1/moe/(clamped|biased-logits)/bfloat16",
    r"L1/moe/(groups/bias/bfloat16|ties/float32|ties/groups/bfloat16|width|unnormalised/float32|many-experts/bfloat16)",
)
CASES = [c for c in all_cases() if c.profile != "mesh" and any(re.match(pattern, c.id) for pattern in CHOSEN)]


@pytest.fixture(scope="module")
def backends() -> dict[int, Interpreted]:
    return {splits: Interpreted(splits) for splits in (1, 3)}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_case(case: Case, backends: dict[int, Interpreted]) -> None:
    splits = 1 if case.needs.dtype == "float32" else 3
    result = run_case(case, lambda tp: backends[splits])
    assert result.status == "pass", result.detail


@pytest.mark.usefixtures("exact")
def test_a_window_one_too_wide_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.attend

    def wide(q: Any, k: Any, v: Any, kv: Any, at: Any, a: AttnSpec) -> Any:
        return right(q, k, v, kv, at, replace(a, window=a.window and a.window + 1))

    monkeypatch.setattr(attention, "attend", wide)
    case = next(c for c in CASES if c.id == "L1/attend/mixed/window-7/bfloat16")
    backend = Interpreted(1)
    assert run_case(case, lambda tp: backend).status == "fail"
