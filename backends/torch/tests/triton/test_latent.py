"""Latent attention, interpreted, on conformance cases: both forms, and heads that take turns."""

from __future__ import annotations

import pytest
from interpreted_backend import Interpreted

from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run_case
from polyradix_torch.triton import latent

CASES = {c.id: c for c in all_cases() if c.profile == "mla"}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(
    ("case", "few", "room"),
    [
        ("L1/attend_latent/whole/temperature/float32", latent.FEW, latent.ROOM),
        ("L1/attend_latent/mixed/peaked/bfloat16", 4, latent.ROOM),
        ("L1/attend_latent/shape-narrow-values/bfloat16", 1, 1),
        ("L1/attend_latent/long/bfloat16", latent.FEW, latent.ROOM),
    ],
)
def test_case(case: str, few: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "FEW", few)
    monkeypatch.setattr(latent, "ROOM", room)
    result = run_case(CASES[case], lambda tp: Interpreted(1 if "float32" in case else 3))
    assert result.status == "pass", result.detail
