"""What is said without a GPU, with a wrong one, and of a right one."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polyradix.backend.capabilities import FEATURES, KV_GROUPS, QUANTS, Unsupported
from polyradix.backend.protocol import KVSpec
from polyradix.backend.registry import DeviceUnavailable, check_drift, open_backend
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
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


def test_create_says_what_is_wrong(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="index is 1; expected 0 to 0"):
        entry.create(index=1)
    with pytest.raises(ValueError, match="index is -1; expected 0 to 0"):
        entry.create(index=-1)
    with pytest.raises(Unsupported, match=r"tp 2 \(1 GPU\(s\) from index 0 on\)"):
        entry.create(tp=2)
    assert entry.create().caps.max_tp == 1
    gpu.capability = (7, 5)
    with pytest.raises(RuntimeError, match=r"GPU 0 has compute capability 7\.5; expected at least 8\.0"):
        entry.create()
    gpu.capability = (8, 6)  # runs code for 8.0
    entry.create()
    gpu.capability = (12, 0)  # its driver compiles what is there for 9.0
    entry.create()
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90a"])
    with pytest.raises(
        RuntimeError, match=r"capability 12\.0; torch .* was built for sm_80, sm_90a: install a newer one"
    ):
        entry.create()
    gpu.available, gpu.init = False, "The NVIDIA driver on your system is too old (found version 11040)."
    with pytest.raises(
        RuntimeError, match=r"torch .* cannot use a GPU: The NVIDIA driver .* too old \(found version 11040"
    ):
        entry.create()


def test_torch_without_cuda() -> None:
    with pytest.raises(RuntimeError, match="cannot use a GPU: Torch not compiled with CUDA enabled"):
        entry.create()


def test_a_model_too_large(gpu: SimpleNamespace, make: Any, tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    free = make().memory().free
    with pytest.raises(
        MemoryError, match=rf"the weights take [\d,]+ bytes of each device and {free:,} are free: [\d,]+ too few"
    ):
        EngineCore(EngineConfig(model=str(tmp_path), load_format="dummy"), make())


def test_capabilities(make) -> None:
    backend = make(capture=False)
    check_drift("cuda", backend)
    assert (backend.caps.name, backend.caps.device) == ("cuda", "Fake GPU")
    assert backend.caps.features == FEATURES | QUANTS | {"kv_fp8", KV_GROUPS}
    assert "eager" in backend.caps.notes[0]
    assert "captured" in make().caps.notes[0]
    for spec, why in (
        (KVSpec(1, 2, 512, 16, "bfloat16"), "head_dim 512"),
        (KVSpec(1, 2, 64, 24, "bfloat16"), "page size 24"),
    ):
        with pytest.raises(Unsupported, match=why):
            backend.alloc_kv(spec, 4)


def test_memory(gpu: SimpleNamespace, make: Any) -> None:
    """Free is what torch holds and does not use, too, but not what the largest step will take again."""
    backend, mib = make(), 1 << 20
    gpu.kept, gpu.peak = 9 * mib, 5 * mib
    assert backend.memory().free == (1 << 30) + 9 * mib - mib // 2
    backend.alloc_kv(KVSpec(1, 2, 64, 16, "bfloat16"), 4)
    assert backend.memory().free == (1 << 30) + 9 * mib - 5 * mib
