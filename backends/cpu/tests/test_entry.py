from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from polyradix_cpu import entry, host
from polyradix_cpu.device import Entry
from polyradix_cpu.native import lib


@pytest.fixture
def no_environment(monkeypatch):
    monkeypatch.delenv("POLYRADIX_CPU_KERNELS", raising=False)
    monkeypatch.delenv("POLYRADIX_CPU_ATTENTION", raising=False)


def test_probe_finds_the_processor_without_importing_torch():
    code = "import sys; from polyradix_cpu import entry; print(entry.probe().rank, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["10", "False"]
    found = entry.probe()
    assert found.available
    assert host.processor()[0] in found.detail


def test_probe_without_torch_says_so(monkeypatch):
    monkeypatch.setattr("polyradix_cpu.device.find_spec", lambda name: None)
    found = Entry().probe()
    assert (found.available, found.detail) == (False, "torch is not installed")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "fast"}, "kernels is 'fast'; expected one of auto, native, torch"),
        ({"attention": "flash"}, "attention is 'flash'; expected one of own, ipex"),
        ({"threads": 0}, "threads is 0; expected at least 1"),
    ],
)
@pytest.mark.usefixtures("no_environment")
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        entry.create(**options)


def test_wrong_environment_is_named(monkeypatch):
    monkeypatch.setenv("POLYRADIX_CPU_KERNELS", "numba")
    with pytest.raises(ValueError, match="POLYRADIX_CPU_KERNELS is 'numba'"):
        entry.create()


def test_the_environment_wins_over_the_option(monkeypatch):
    monkeypatch.setenv("POLYRADIX_CPU_KERNELS", "torch")
    backend = entry.create(kernels="native")
    assert backend.caps.notes[0].startswith("kernels: torch")


@pytest.mark.usefixtures("no_environment")
def test_threads_are_set():
    before = torch.get_num_threads()
    try:
        entry.create(threads=1)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_every_kernel_library_was_built():
    """Also those that this processor cannot run: nothing else would notice that one does not compile."""
    assert [isa for isa in lib.NEEDS if not lib._path(isa).exists()] == []
