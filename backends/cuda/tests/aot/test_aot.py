"""Every kernel compiles for a chip that is not here; and each gate stops a kernel that was planted for it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from polyradix_cuda.aot import MODULE
from polyradix_torch.triton import aot

LAUNCHES = "polyradix_torch.triton.launches:tested"
worker = partial(aot.worker, MODULE, folder=Path(__file__).parents[3] / "torch/tests/triton")


def test_every_kernel() -> None:
    """For one chip; `python -m polyradix_cuda.aot` takes all."""
    built, why = worker("sm_90", LAUNCHES)
    assert why == ""
    assert [o for b in built for o in b.objections] == []
    every = "_norm _rope _gated _write _best _best_of _take _product _wide _decode _merge _prefill _prefix _common"
    every += " _logits _route _experts _sum _prepare _absorbed _join _finish _gather _expanded"
    every += " _codes _dense _quant _rank"
    assert {b.kernel for b in built} == set(every.split())


@pytest.mark.parametrize(
    ("source", "chip", "objection"), [("spills", "sm_90", "spills"), ("too_large", "sm_120", "takes 131")]
)
def test_what_would_not_run_well_is_found(source: str, chip: str, objection: str) -> None:
    (built,), why = worker(chip, f"planted:{source}")
    assert why == ""
    assert [objection in o for o in built.objections] == [True]


def test_what_takes_too_long_is_ended() -> None:
    built, why = worker("sm_90", LAUNCHES, 0.01)
    assert built == []
    assert "Timeout" in why
