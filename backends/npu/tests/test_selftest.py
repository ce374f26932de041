"""The command for owners of a device, on the simulated one: it finds nothing wrong, and it does find what is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from polyradix_npu import contracts_exchange, selftest
from polyradix_npu.emulate import reference


def test_it_passes_and_writes_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["selftest", "--emulate", "--quick", "-o", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "all is well (emulated, which says nothing of a device)" in out
    made = json.loads((tmp_path / "out.json").read_text())
    seen = {text.partition(":")[0] for _, _, text in made["lines"]}
    assert seen >= set(reference.OPS) - {"npu_format_cast", *contracts_exchange.CHECKS}
    assert "ok  HCCL: dispatch and combine over 2 simulated ranks: error" in out
    assert made["emulated"]


def test_a_wrong_op_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "CONFIGS", {"Llama": selftest.CONFIGS["Llama"]})
    right = reference.OPS["npu_swiglu"]
    calls: list[int] = []

    def wrong(c: reference.Args) -> torch.Tensor:
        calls.append(1)
        return right(c) * (1 + len(calls) % 2)  # the device's answer is not that of the reference

    monkeypatch.setitem(reference.OPS, "npu_swiglu", wrong)
    assert selftest.main(["selftest", "--emulate", "--quick", "-o", str(tmp_path / "out.json")]) == 1
    out = capsys.readouterr().out
    assert "BAD Llama, small: npu_swiglu" in out
    assert "NOT well" in out


def test_without_a_device_the_remedy_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert selftest.main(["selftest"]) == 2
    assert "--emulate" in capsys.readouterr().err
