"""Caches in groups, whose layers share arrays inside one program: on one device, and split over two."""

from __future__ import annotations

import pytest

from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run_case
from polyradix_tpu import entry

CASES = [c for c in all_cases() if c.id in ("L1/kv_groups/chunked/bfloat16", "L5/kv_groups/tp-2/float32")]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_case(case):
    result = run_case(case, lambda tp: entry.create(platform="cpu", tp=tp))
    assert result.status == "pass", result.detail
