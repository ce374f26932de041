"""Every kernel compiles for chips that are not here; and each gate stops a kernel that was planted for it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from polyradix_rocm.aot import CHIPS, MODULE
from polyradix_torch.triton import aot

worker = partial(aot.worker, MODULE, folder=Path(__file__).parents[3] / "torch/tests/triton")
CODE = ".vgpr_count: 8\n.vgpr_spill_count: 0\n.sgpr_spill_count: {scalar}\n.private_segment_fixed_size: 0\n{product}"


@pytest.mark.parametrize("chip", CHIPS)
def test_what_is_served(chip: str) -> None:
    """`python -m polyradix_rocm.aot` takes the products too."""
    built, why = worker(chip, f"{MODULE}:served")
    assert why == ""
    assert [f"{b.launch} {b.kernel}: {o}" for b in built for o in b.objections] == []
    every = "_norm _rope _gated _write _best _best_of _take _decode _merge _prefill _prefix _common"
    every += " _logits _route _experts _sum _prepare _absorbed _join _finish _gather _expanded"
    every += " _codes _dense _quant _rank _slots"
    assert {b.kernel for b in built} == set(every.split())


@pytest.fixture(scope="module")
def planted() -> dict[tuple[str, str], aot.Built]:
    """By chip and launch; one process compiles a chip's."""
    found: dict[tuple[str, str], aot.Built] = {}
    for chip in CHIPS:
        built, why = worker(chip, f"planted:{chip}")
        assert why == ""
        found |= {(chip, b.launch): b for b in built}
        assert len(built) == 4
    return found


@pytest.mark.parametrize(
    ("launch", "chip", "objection"),
    [
        ("spills", "gfx942", "vector registers"),
        ("spills", "gfx950", "bytes of scratch"),
        ("larger", "gfx942", "takes 131072 bytes of shared memory; a block may have 65536"),
        ("by lanes", "gfx950", "without the matrix units"),
        ("e4m3fn", "gfx942", "emulates f8E4M3FN"),
        ("e4m3fnuz", "gfx950", "emulates f8E4M3FNUZ"),
    ],
)
def test_what_would_not_run_well_is_found(planted: Any, launch: str, chip: str, objection: str) -> None:
    assert any(objection in o for o in planted[chip, launch].objections)


@pytest.mark.parametrize(("launch", "chip"), [("e4m3fnuz", "gfx942"), ("e4m3fn", "gfx950")])
def test_its_own_float8_is_fine(planted: Any, launch: str, chip: str) -> None:
    built = planted[chip, launch]
    assert built.objections == []
    assert built.figures["mfma"] > 0


def test_judge_reads_the_compilers_output() -> None:
    """Scalar registers, which no small kernel spills; and a product of which one half is by lanes."""
    judge = CHIPS["gfx942"].judge
    halves = "%0 = tt.dot %a : tensor<#mma>\n%1 = tt.dot %b : tensor<#blocked>"
    asm = {"ttir": "", "ttgir": halves, "amdgcn": CODE.format(scalar=3, product="v_mfma_f32_32x32x8_bf16_1k")}
    figures, objections = judge(SimpleNamespace(asm=asm))
    assert figures == {"vgprs": 8, "spills": 3, "scratch": 0, "mfma": 1}
    assert objections == ["spills 3 scalar registers", "multiplies without the matrix units"]
    with pytest.raises(RuntimeError, match="no vgpr_spill_count"):
        judge(SimpleNamespace(asm=asm | {"amdgcn": ""}))


def test_what_takes_too_long_is_ended() -> None:
    built, why = worker("gfx942", f"{MODULE}:served", 0.01)
    assert built == []
    assert "Timeout" in why
