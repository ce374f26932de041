"""What a user is told where the device cannot be used, and by which remedy it can."""

from __future__ import annotations

from pathlib import Path

import pytest

from polyradix.backend.capabilities import Needs, Unsupported, validate
from polyradix.backend.protocol import KVSpec
from polyradix.backend.registry import DeviceUnavailable, open_backend
from polyradix_npu import device, entry


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr(device, "_installed", lambda name: versions.get(name.replace("-", "_")))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One with CANN, a device, and wheels that fit."""
    for path in ("dev/davinci0", "dev/davinci_manager", "cann/libhccl.so"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    monkeypatch.setattr(device, "ROOT", tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path}/other:{tmp_path}/cann")
    installed(monkeypatch, torch="2.13.0+cpu", torch_npu="2.13.0.post1")
    return tmp_path


def test_a_whole_machine_is_used(machine: Path) -> None:
    found = entry.probe()
    assert (found.available, found.emulated, found.detail) == (True, False, "CANN and 1 Ascend device(s) found")


def test_without_the_wheel(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch="2.13.0")
    found = entry.probe()
    assert not found.available
    assert "pip install 'polyradix-npu[npu]'" in found.detail


def test_without_cann_it_is_emulated_and_says_why_import_torch_fails(machine: Path) -> None:
    (machine / "cann/libhccl.so").unlink()
    found = entry.probe()
    assert (found.available, found.emulated) == (True, True)
    assert "source set_env.sh" in found.detail
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in found.detail


def test_without_cann_and_a_compiler(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "cann/libhccl.so").unlink()
    monkeypatch.setattr(device, "which", lambda name: None)
    assert not entry.probe().available


def test_without_a_device(machine: Path) -> None:
    (machine / "dev/davinci0").unlink()
    assert "install the driver" in entry.probe().detail


def test_wheels_that_do_not_fit(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch="2.12.1", torch_npu="2.13.0")
    assert "torch 2.12.1 does not fit torch-npu 2.13.0: pip install 'torch==2.13.*'" in entry.probe().detail


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="index is 3; expected 0 to 0"):
        entry.create(index=3, emulated=True)
    monkeypatch.setattr("torch.npu.is_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match="npu-smi info"):
        entry.create()


def test_emulation_must_be_asked_for() -> None:
    with pytest.raises(DeviceUnavailable, match="--emulate"):
        open_backend("npu")


def test_more_ranks_than_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unsupported, match="2 ranks are simulated"):
        open_backend("npu", emulate=True, tp=3)
    with pytest.raises(Unsupported, match=r"tp 4 \(1 device\(s\) from index 0 on\)"):
        entry.create(tp=4)
    monkeypatch.setattr("torch.distributed.is_hccl_available", lambda: False)
    with pytest.raises(DeviceUnavailable, match=r"no HCCL: source set_env.sh of the CANN toolkit, or take tp 1"):
        entry.create(tp=2)


def test_a_group_is_made_as_the_wheel_wants_it() -> None:
    from torch.distributed import HashStore

    from polyradix_npu.emulate.mesh import VERBS
    from polyradix_npu.mesh import hccl

    group = hccl(HashStore(), 0, 1)
    assert (group.rank(), group.size()) == (0, 1)
    assert {*VERBS, "abort", "get_hccl_comm_name"} <= set(dir(group))


def test_what_it_cannot_serve_is_named() -> None:
    backend = open_backend("npu", emulate=True)
    assert backend.caps.emulated
    reasons = validate(Needs("bfloat16", 72, frozenset({"kv_fp8"})), backend.caps, 16)
    text = "; ".join(map(str, reasons))
    assert "head_dim 72; the backend offers multiples of 16 up to 512" in text
    assert "feature kv_fp8" in text
    assert "page size 16; the backend offers 128" in text
    with pytest.raises(Unsupported, match="head_dim 528"):
        backend.alloc_kv(KVSpec(1, 1, 528, 128, "bfloat16"), 2)


def test_the_probe_of_head_sizes_keeps_what_the_device_takes() -> None:
    import torch

    from polyradix_npu import calls
    from polyradix_npu.attention import Forms, Fused
    from polyradix_npu.emulate.graphs import device as simulated

    with simulated():
        mask = calls.fixed_mask(torch.device("npu"))
        for cann in ("9.1.0", "8.3.RC1", ""):
            fused = Fused(mask, cann, 128)
            assert fused.forms(128) == fused.forms(192) == Forms("TND", "TND")
            assert fused.forms(64) == Forms("BSND", "BSND")  # TND is refused by the documents
            assert fused.forms(512) == Forms("BSND", "BSND")
        assert Fused(mask, "8.3.RC1", 16).forms(64) == Forms("BSND", "torch")  # longer prompts want pages of 128
        assert Fused(mask, "7.0", 128).forms(128) == Forms("torch", "torch")
