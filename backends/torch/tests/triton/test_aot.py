"""Every kernel compiles for chips that are not here; and each gate of aot.py stops a kernel that was planted for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import aot
import pytest


def test_every_kernel_on_every_chip() -> None:
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(aot.worker, aot.SHARED))
    print(aot.table([b for built, _ in done for b in built]))
    assert [why for _, why in done if why] == []
    assert [o for built, _ in done for b in built for o in b.objections] == []
    every = {"_norm", "_rope", "_gated", "_write", "_best", "_best_of", "_take", "_decode", "_merge", "_prefill"}
    assert [{b.kernel for b in built} for built, _ in done] == [every] * len(aot.SHARED)


@pytest.mark.parametrize(("source", "chip", "objection"), [("spills", "sm_90", "spills"), ("too_large", "sm_120", "takes 131")])
def test_what_would_not_run_well_is_found(source: str, chip: str, objection: str) -> None:
    (built,), why = aot.worker(chip, f"planted:{source}")
    assert why == ""
    assert [objection in o for o in built.objections] == [True]


def test_what_does_not_compile_is_named() -> None:
    built, why = aot.worker("sm_90", "planted:refused")
    assert [b.launch for b in built] == ["fine"]
    assert "sm_90 refused" in why
    assert "CompilationError" in why


def test_what_takes_too_long_is_ended() -> None:
    built, why = aot.worker("sm_90", seconds=0.01)
    assert built == []
    assert "Timeout" in why
