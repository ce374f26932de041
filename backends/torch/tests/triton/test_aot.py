"""The kernels as serving launches them, compiled for a chip that is not here."""

from __future__ import annotations

from aot import worker

CHIP = "sm_90"


def only(condition: str) -> str:
    return f"todo = ((name, call) for name, call in todo if {condition})"


def test_serving_shapes_fit_and_do_not_spill() -> None:
    built, error = worker(CHIP, only('"float32" not in name and "D256" not in name'))
    assert not error
    assert {b.kernel for b in built} >= {
        "_norm",
        "_rope",
        "_gated",
        "_write",
        "_best",
        "_take",
        "_decode",
        "_merge",
        "_prefill",
    }
    assert [o for b in built for o in b.objections] == []


def test_a_kernel_that_spills_is_seen() -> None:
    built, error = worker(CHIP, only('name == "D256 G4"'))
    assert not error
    assert any("spills" in o for b in built for o in b.objections)


def test_a_kernel_that_takes_too_long_is_an_error() -> None:
    _, error = worker(CHIP, "limit = 0.001")
    assert "exit status 1" in error
