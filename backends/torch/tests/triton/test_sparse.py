"""Attention over selected rows, interpreted, on small conformance cases, also where tokens take turns or see all."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from interpreted_backend import Interpreted

from polyradix_conformance.cases import all_cases
from polyradix_conformance.cases.sparse import FLAT, PLAIN, attention
from polyradix_conformance.runner import run_case
from polyradix_torch.triton import sparse

CASES = {c.id: c for c in all_cases() if c.profile == "sparse"}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("dtype", "regime", "room", "top_k"),
    [("float32", "ties", 1 << 12, 6), ("bfloat16", "spread", sparse.ROOM, 6), ("bfloat16", "equal", sparse.ROOM, 40)],
)
def test_case(dtype: str, regime: str, room: int, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "ROOM", room)
    a, s = replace(FLAT, heads=2, attn_scale=0.5, floor_scale=5), replace(PLAIN, top_k=top_k)
    run = partial(attention, plan="mixed", a=a, s=s, regime=regime, lengths=(18, 3))
    case = replace(CASES[f"L1/attend_sparse/mixed/ties/{dtype}"], run=run)
    result = run_case(case, lambda tp: Interpreted(1 if dtype == "float32" else 3))
    assert result.status == "pass", result.detail
