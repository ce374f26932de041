from __future__ import annotations

import re
import subprocess
import sys

import pytest

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import KVSpec, Memory, ParamSpec
from polyradix.backend.registry import DeviceUnavailable, open_backend
from polyradix_tpu import device, entry


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_probe_imports_no_jax():
    out = run("import sys; from polyradix_tpu import entry; print(entry.probe().available, 'jax' in sys.modules)")
    assert out.split() == ["True", "False"]


def test_probe_without_jax_says_so(monkeypatch):
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert entry.probe().detail == "jax is not installed"
    assert not entry.probe().available


@pytest.mark.parametrize("file", ["dev/accel0", "dev/vfio/0"])
def test_a_tpu_is_a_device_file_and_its_library(monkeypatch, tmp_path, file):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(device, "find_spec", lambda name: name)
    assert not device.has_tpu(tmp_path)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert device.has_tpu(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not device.has_tpu(tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    assert not device.has_tpu(tmp_path)


def test_a_found_tpu_is_what_create_opens(monkeypatch):
    monkeypatch.setattr(device, "has_tpu", lambda: True)
    found = entry.probe()
    assert (found.emulated, found.options) == (False, {"platform": "tpu"})
    with pytest.raises(DeviceUnavailable, match=r"JAX finds no TPU, only cpu:0 \(cpu\).*--emulate"):
        entry.create(**found.options)


def test_without_a_tpu_emulation_has_to_be_asked_for():
    assert re.fullmatch(r"no TPU; JAX has .*cpu, and runs emulated there with --emulate", entry.probe().detail)
    with pytest.raises(DeviceUnavailable, match="--emulate"):
        open_backend("tpu")
    assert open_backend("tpu", emulate=True).caps.emulated


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tp": 0}, ValueError, "tp is 0; expected at least 1"),
        ({"tp": 5}, Unsupported, r"tp 5 \(JAX has 4 devices: cpu:0, .*JAX_NUM_CPU_DEVICES"),
        ({"growth": 1}, ValueError, "growth is 1; expected at least 2"),
        ({"kernels": "cuda"}, ValueError, "kernels is 'cuda'; expected one of auto, pallas, xla"),
        ({"platform": "npu"}, ValueError, "platform is 'npu'; expected one of auto, tpu, gpu, cpu"),
    ],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        entry.create(**{"platform": "cpu"} | options)


def test_a_jax_that_runs_already_keeps_its_devices():
    code = """
import jax
jax.devices()
from polyradix_tpu import entry
try:
    entry.create(tp=2, platform="cpu")
except NotImplementedError as e:
    print(e)
"""
    assert "tp 2 (JAX has 1 devices: cpu:0; set JAX_NUM_CPU_DEVICES" in run(code)


def never(part: str = "weight") -> None:
    raise AssertionError("a parameter was read")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (ParamSpec("w", "linear", (6, 4), "float32", (3, 3), 0), "parameter w: segments has 3"),
        (ParamSpec("w", "linear", (4, 4), "float16"), "parameter w; expected one of"),
    ],
)
def test_wrong_parameters_are_refused_unread(spec, message):
    with pytest.raises((ValueError, Unsupported), match=message):
        entry.create(platform="cpu", tp=2).pack(spec, never)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 512}, "head_dim 512"),
        ({"dtype": "float16"}, "dtype float16"),
        ({"page_size": 7}, "page size 7"),
        ({"kv_heads": 3}, "kv_heads is 3; expected a multiple of tp"),
    ],
)
def test_wrong_caches_are_refused(change, message):
    values = {"layers": 1, "kv_heads": 2, "head_dim": 64, "page_size": 16, "dtype": "float32"} | change
    with pytest.raises((ValueError, Unsupported), match=message):
        entry.create(platform="cpu", tp=2).alloc_kv(KVSpec(**values), 2)


def test_the_hosts_memory_is_what_linux_calls_available(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal:  100 kB\nMemFree:  1 kB\nMemAvailable:  40 kB\n")
    assert device.host_memory(tmp_path) == Memory(40 * 1024, 100 * 1024)
    assert device.host_memory(tmp_path / "elsewhere").free > 0
