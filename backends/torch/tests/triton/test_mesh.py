"""Triton's kernels over two ranks, interpreted: a whole model, and logits whose rows two do not divide."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from interpreted_backend import Interpreted, interpreted

from polyradix_conformance.cases import Case, all_cases
from polyradix_conformance.runner import run_case
from polyradix_torch.mesh import Mesh, gloo

CHOSEN = "L5/biased/tp-2/bfloat16", "L1/logits/tp-2/bfloat16"
CASES = [c for c in all_cases() if c.id in CHOSEN]


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    made = Mesh(interpreted, gloo, 2)
    yield made
    made._end()


def test_the_chosen_cases_exist() -> None:
    assert len(CASES) == len(CHOSEN)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_case(case: Case, mesh: Mesh) -> None:
    result = run_case(case, lambda tp: mesh if tp == 2 else Interpreted(1))
    assert result.status == "pass", result.detail
