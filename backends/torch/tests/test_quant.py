"""Weights kept quantised in plain torch: conformance of a backend that claims them."""

from __future__ import annotations

import re

import pytest

from polyradix_conformance.cases import Case, all_cases
from polyradix_conformance.runner import run_case
from polyradix_torch import TorchBackend

CASES = [c for c in all_cases() if re.match("L1/quant/.*/bfloat16", c.id)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_case(case: Case, backend: TorchBackend) -> None:
    result = run_case(case, lambda tp: backend)
    assert result.status == "pass", result.detail
