"""What is said of GPUs that are not there, wrong, or right."""

from __future__ import annotations

import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.registry import DeviceUnavailable, open_backend
from polyradix_rocm import backend, device, entry
from polyradix_rocm.aiter.installed import Installed, NoAiter
from polyradix_rocm.aiter.signatures import recorded
from polyradix_torch import gpu


def test_import_and_probe_load_no_framework() -> None:
    code = "import sys, polyradix_rocm as p; p.entry.probe(); print({'torch', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_probe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(device, "DRIVER", tmp_path / "kfd")
    found = entry.probe()
    assert (found.available, found.emulated, found.rank) == (True, True, -1)
    assert found.detail.startswith(f"no AMD driver ({tmp_path / 'kfd'}); AITER can be simulated")
    with pytest.raises(DeviceUnavailable, match=r"device 'rocm' cannot be used: no AMD driver .* with --emulate"):
        open_backend("rocm")
    (tmp_path / "kfd").touch()
    found = entry.probe()
    assert (found.available, found.emulated, found.rank) == (True, False, 20)
    monkeypatch.setattr(device, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    hint = ": torch for ROCm brings it, and to emulate, pip install triton"
    assert (entry.probe().available, entry.probe().detail) == (False, f"triton not installed{hint}")


def fake(name: str, hip: str | None = "6.4") -> SimpleNamespace:
    """torch, of one GPU."""
    properties = SimpleNamespace(gcnArchName=name)
    cuda = SimpleNamespace(get_device_properties=lambda index: properties)
    return SimpleNamespace(__version__="2.11", version=SimpleNamespace(hip=hip), cuda=cuda)


def test_arch() -> None:
    assert device.arch_of(fake("gfx942:sramecc+:xnack-"), 0) == "gfx942"
    assert device.arch_of(fake("gfx950"), 0) == "gfx950"
    with pytest.raises(RuntimeError, match=r"GPU 1 is a gfx1100; expected one of: gfx942 \(MI300X, .*gfx950"):
        device.arch_of(fake("gfx1100"), 1)
    with pytest.raises(RuntimeError, match=r"torch 2\.11 is not built for ROCm: install one"):
        device.check_torch(fake("gfx942", None))
    old = fake("gfx942")
    device.check_torch(old)
    old.__version__ = "2.9.1+rocm6.4"
    with pytest.raises(RuntimeError, match=r"torch is 2\.9\.1\+rocm6\.4; expected at least 2\.10"):
        device.check_torch(old)


def test_this_torch_is_refused() -> None:
    with pytest.raises(RuntimeError, match="is not built for ROCm"):
        entry.create()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"simulate": "gfx90a"}, "simulate is 'gfx90a'; expected one of gfx942, gfx950"),
        ({"aiter": "0.1.7"}, "aiter is '0.1.7'; expected one of 0.1.10, 0.1.20"),
        ({"platform": "tpu"}, "platform is 'tpu'; expected one of auto, cpu, gpu"),
    ],
)
def test_wrong_options_are_named(option: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entry.create(**{"simulate": "gfx942", **option})  # type: ignore[arg-type]


def test_emulated_says_so() -> None:
    backend = open_backend("rocm", emulate=True, simulate="gfx950", aiter="0.1.10", platform="cpu")
    assert (backend.caps.emulated, backend.caps.device) == (True, "CPU, as gfx950")
    assert backend.caps.notes == ("AITER 0.1.10 for gfx950 is simulated: no kernel of AMD's runs",)


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU that passes for AMD's; `create` gives what RocmBackend would be made with."""
    for name, value in {
        "check_torch": lambda torch: None,
        "use_gpu": lambda index: None,
        "arch_of": lambda torch, index: "gfx942",
        "RocmBackend": lambda *given: given,
    }.items():
        monkeypatch.setattr(backend, name, value)
    return monkeypatch


def test_without_aiter(amd: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def none(arch: str) -> Installed:
        raise NoAiter("amd-aiter is not installed: install it")

    amd.setattr(backend, "installed", none)
    note = "Triton for every verb: amd-aiter is not installed: install it"
    assert entry.create(index=3, capture=False) == (3, False, None, note)
    assert [r.getMessage() for r in caplog.records] == [note]


def test_of_several_gpus_each_rank_has_its_own(amd: pytest.MonkeyPatch) -> None:
    amd.setattr(backend, "installed", lambda arch: Installed("0.1.20", arch, recorded("0.1.20"), "0.1.20"))
    amd.setattr(backend, "quick", lambda aiter, device: [])
    amd.setattr(gpu, "use_gpu", lambda index: None)
    amd.setattr(gpu.torch.cuda, "device_count", lambda: 4)
    amd.setattr(gpu, "Mesh", lambda make, join, tp: (make, join, tp))
    amd.setattr(gpu.dist, "is_nccl_available", lambda: False)
    amd.setattr(gpu.torch.version, "hip", "7.1")
    with pytest.raises(RuntimeError, match=r"tp 3: torch .* is built without RCCL: install another, or take tp 1"):
        entry.create(index=1, tp=3)
    amd.setattr(gpu.dist, "is_nccl_available", lambda: True)
    make, join, tp = entry.create(index=1, tp=3)
    assert (join, tp) == (gpu.nccl, 3)
    made = pickle.loads(pickle.dumps(make))  # as it comes to the others
    assert [made(rank)[0] for rank in range(3)] == [1, 2, 3]
    with pytest.raises(Unsupported, match=r"tp 4 \(3 GPU\(s\) from index 1 on\)"):
        entry.create(index=1, tp=4)
    with pytest.raises(Unsupported, match="tp 2"):
        entry.create(simulate="gfx942", tp=2)


def test_with_aiter(amd: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What does not bind and what fails is said."""
    signatures = {**recorded("0.1.20"), "aiter.mla.mla_decode_fwd": recorded("0.1.20")["aiter.fused_moe.fused_moe"]}
    amd.setattr(backend, "installed", lambda arch: Installed("0.1.20", arch, signatures, "0.1.21"))
    amd.setattr(backend, "quick", lambda aiter, device: [f"rope on {device}: wrong"])
    index, capture, aiter, note = entry.create()
    assert (index, capture, aiter.unfit.keys()) == (0, True, {"mla_decode_fwd"})
    assert note.startswith(
        "amd-aiter 0.1.21, unknown, called as 0.1.20: run polyradix-rocm selftest; not used: aiter.mla"
    )
    assert note.endswith("; Triton instead of rope on cuda:0: wrong")
    assert [r.getMessage() for r in caplog.records] == [note]
