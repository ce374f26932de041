"""The selftest finds what is wrong, and a server goes on without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from whole import MODELS, answers, core, follow, prompts

from polyradix.backend.registry import open_backend
from polyradix_rocm import selftest
from polyradix_rocm.aiter.calls import CALLS, Aiter
from polyradix_rocm.aiter.installed import NoAiter
from polyradix_rocm.backend import CpuBackend
from polyradix_rocm.cases import SMALL, cases
from polyradix_rocm.simulator import FP8, Simulator


class Broken(Simulator):
    """Rope turns the other way, decodes raise, and experts give NaN."""

    def _rope_cached_positions_2c_fwd(self, a: Any) -> Any:
        a.sin = -a.sin
        return super()._rope_cached_positions_2c_fwd(a)

    def _paged_attention_ragged(self, a: Any) -> Any:
        raise RuntimeError("no kernel image\nmore")

    def _fused_moe(self, a: Any) -> Any:
        return super()._fused_moe(a) * float("nan")


BROKEN = {"rope_cached_positions_2c_fwd", "paged_attention_ragged", "fused_moe", "shuffle_weight"}


def test_every_call_has_a_case() -> None:
    made = {name for case in cases(SMALL, "cpu", FP8["gfx950"]) for name in case.calls}
    assert made == CALLS.keys()


def test_a_page_and_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["selftest", "--simulate", "gfx950", "--quick", "-o", str(tmp_path / "new")]) == 0
    page = capsys.readouterr().out.splitlines()
    assert len(page) < 66
    assert page[-1].startswith("0 of 19 failed; send ")
    report = json.loads((tmp_path / "new" / "rocm-selftest.json").read_text())
    assert (report["failed"], len(report["results"])) == (0, 19)
    assert report["facts"]["aiter"].startswith("simulated for gfx950")


def test_without_the_hardware(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["selftest", "-o", str(tmp_path)]) == 1
    assert "is not built for ROCm: install one" in capsys.readouterr().out


def test_without_aiter_the_rest_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(simulate: str | None) -> Any:
        raise NoAiter("amd-aiter is not installed: install it")

    monkeypatch.setattr(selftest, "opened", opened)
    monkeypatch.setattr(selftest, "multiplied", lambda: "differs by 0")
    monkeypatch.setattr(selftest.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(selftest.torch.multiprocessing, "spawn", lambda rank, args, nprocs: None)
    monkeypatch.setattr(selftest, "_last_line", lambda command: " ".join(command[3:7]))
    assert selftest.main(["selftest", "-o", str(tmp_path)]) == 1
    page = capsys.readouterr().out
    assert "amd-aiter is not installed: install it" in page
    for text in ("over 2 GPUs", "run --profile mla --backend", "run --profile mesh --backend", "1 of 10 failed"):
        assert text in page


def test_what_is_broken_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(selftest, "opened", lambda simulate: (Aiter(Broken("gfx942", "0.1.20")), "broken"))
    assert selftest.main(["selftest", "--simulate", "gfx942", "--quick", "-o", str(tmp_path)]) == 1
    page = capsys.readouterr().out
    assert page.splitlines()[-1].startswith("6 of 19 failed")
    assert "RuntimeError: no kernel image\n" in page
    assert "ArithmeticError: differs by inf of the largest value; at most 0.02" in page


def test_a_server_falls_back(tmp_path: Path) -> None:
    aiter = Aiter(Broken("gfx942", "0.1.20"))
    reasons = selftest.quick(aiter, "cpu")
    assert aiter.unfit.keys() == BROKEN
    assert len(reasons) == 3
    assert reasons[0].startswith("rope: ArithmeticError: differs by ")
    config = MODELS["qwen3-moe"]
    asked = [(prompt, 8) for prompt in prompts(config["vocab_size"], 3)]
    reference = answers(core(open_backend("cpu", kernels="torch"), config, tmp_path), asked)
    assert follow(core(CpuBackend(aiter, ""), config, tmp_path), reference, 0.05) > 0.9


def test_nothing_fails_by_itself() -> None:
    assert selftest.quick(Aiter(Simulator("gfx950", "0.1.10")), "cpu") == []


@pytest.mark.parametrize("bound", [0.0, 1e-3])
def test_a_difference_is_measured(bound: float) -> None:
    case = next(iter(cases(SMALL, "cpu", FP8["gfx942"])))
    mine = Aiter(Simulator("gfx942", "0.1.20"))
    assert case.error(mine, mine) == 0
    nudged = type(case)(case.name, case.calls, lambda aiter: torch.tensor([1.0, 2.0 + (aiter is mine)]), bound)
    assert nudged.error(mine, Aiter(Simulator("gfx942", "0.1.20"))) == 0.5
