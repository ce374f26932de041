"""What is said without a GPU, with a wrong one, and of a right one."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from polyradix.backend.capabilities import FEATURES, Unsupported
from polyradix.backend.protocol import KVSpec
from polyradix.backend.registry import DeviceUnavailable, check_drift, open_backend
from polyradix_cuda import device, entry


def test_import_and_probe_load_no_framework() -> None:
    code = "import sys, polyradix_cuda as p; p.entry.probe(); print({'torch', 'triton'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_probe_names_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    assert (entry.probe().available, entry.probe().detail) == (False, "triton not installed")
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert entry.probe().detail == "torch and triton not installed"


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the driver lists its GPUs; it is not there."""
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: exists(self) and self != Path("/dev/nvidiactl"))
    monkeypatch.setattr(device, "DRIVER", tmp_path / "gpus")
    return tmp_path / "gpus"


def test_probe_without_a_driver(driver: Path) -> None:
    found = entry.probe()
    assert not found.available
    assert "no NVIDIA driver (neither /dev/nvidiactl nor" in found.detail
    with pytest.raises(DeviceUnavailable, match="device 'cuda' cannot be used: no NVIDIA driver"):
        open_backend("cuda")


def test_probe_counts_gpus(driver: Path) -> None:
    for name in ("0000:01:00.0", "0000:02:00.0"):
        (driver / name).mkdir(parents=True)
    assert (entry.probe().available, entry.probe().detail) == (True, "NVIDIA driver found, 2 GPU(s)")


def test_create_says_what_is_wrong(gpu: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="index is 1; expected 0 to 0"):
        entry.create(index=1)
    with pytest.raises(ValueError, match="index is -1; expected 0 to 0"):
        entry.create(index=-1)
    gpu.capability = (7, 5)
    with pytest.raises(RuntimeError, match=r"GPU 0 has compute capability 7\.5; expected at least 8\.0"):
        entry.create()
    gpu.available = False
    with pytest.raises(RuntimeError, match="sees no GPU: is its CUDA build installed, and the driver new enough"):
        entry.create()


def test_capabilities(make) -> None:
    backend = make(capture=False)
    check_drift("cuda", backend)
    assert (backend.caps.name, backend.caps.device, backend.caps.features) == ("cuda", "Fake GPU", FEATURES)
    assert "eager" in backend.caps.notes[0]
    assert "captured" in make().caps.notes[0]
    assert backend.memory().free == (1 << 30) + (1 << 19), "what torch holds and does not use is free"
    for spec, why in (
        (KVSpec(1, 2, 512, 16, "bfloat16"), "head_dim 512"),
        (KVSpec(1, 2, 64, 24, "bfloat16"), "page size 24"),
    ):
        with pytest.raises(Unsupported, match=why):
            backend.alloc_kv(spec, 4)
