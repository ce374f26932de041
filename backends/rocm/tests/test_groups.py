"""Caches in groups, whose tables AITER gets without what was given back: it may not mask what it reads there."""

from __future__ import annotations

from typing import Any

import pytest

from polyradix_conformance.cases.kv_groups import Flow, chunked, decode
from polyradix_conformance.rig import Rig
from polyradix_rocm.backend import emulate


@pytest.mark.parametrize("plan", [chunked, decode])
def test_prefill_and_decode(plan: Any) -> None:
    backend: Any = emulate("gfx942", "0.1.20", "cpu")
    plan(Flow(Rig(backend, "bfloat16"), 128))
    assert "mha_batch_prefill_func" in backend._verbs.aiter.provider.calls
