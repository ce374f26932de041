"""Attention over selected rows on conformance cases: exact selections, on one rank and on two, and a whole model."""

from __future__ import annotations

import pytest

from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run_case
from polyradix_tpu import entry

CHOSEN = {
    "L1/attend_sparse/mixed/ties/bfloat16",
    "L1/attend_sparse/top-1/float32",
    "L2/sparse/written/float32",
    "L3/deepseek-v3.2/whole/float32",
    "L5/attend_sparse/tp-2/float32",
}
CASES = [c for c in all_cases() if c.id in CHOSEN]


def test_all_are_there() -> None:
    assert {c.id for c in CASES} == CHOSEN


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_case(case) -> None:
    result = run_case(case, lambda tp: entry.create(tp=tp, platform="cpu"))
    assert result.status == "pass", result.detail
