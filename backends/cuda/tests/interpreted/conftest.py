"""A GPU made of torch on the CPU, Triton's interpreter, and graphs that run their step again. Its own process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3] / "torch/tests/triton"))

import pytest
import torch
from exact_interpreter import exact

import polyradix_cuda.backend
import polyradix_torch.gpu
from polyradix_torch.triton.capture import Graphs

__all__ = ["exact"]


class FakeGraph:
    """What is recorded into it is the last step that a Recorded ran."""

    last: Any = None

    def __init__(self) -> None:
        self.step: Any = None
        self.out: Any = None

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.out.copy_(self.step())


class Recorded(Graphs):
    def __init__(self, step: Any, *rest: Any) -> None:
        def recorded(*args: Any) -> Any:
            out = step(*args)
            FakeGraph.last = (lambda: step(*args)[0]), out[0]
            return out

        super().__init__(recorded, *rest)


@contextmanager
def record(graph: FakeGraph, pool: Any, capture_error_mode: str) -> Iterator[None]:
    yield
    graph.step, graph.out = FakeGraph.last
    graph.out.fill_(float("nan"))  # capture computes nothing


class FakeEvent:
    """Done once it was asked `left` times, or waited for."""

    def __init__(self, left: int) -> None:
        self.left = left

    def record(self) -> None: ...

    def synchronize(self) -> None:
        torch.cuda.synchronize()
        self.left = 0

    def query(self) -> bool:
        torch.cuda.synchronize()
        self.left -= 1
        return self.left < 0


@pytest.fixture
def gpu(exact: None, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch says of the GPU, to be changed by a test."""
    says = SimpleNamespace(
        count=1, capability=(9, 0), available=True, init="", broken="", asked=0, peak=1 << 19, kept=1 << 20
    )

    def raises(what: str) -> None:
        if text := getattr(says, what):
            raise RuntimeError(text)

    stream = SimpleNamespace(wait_event=lambda event: None, wait_stream=lambda stream: None)
    properties = SimpleNamespace(name="Fake GPU", multi_processor_count=4)
    for name, value in {
        "is_available": lambda: says.available,
        "device_count": lambda: says.count,
        "get_device_capability": lambda index: says.capability,
        "get_device_properties": lambda device: properties,
        "mem_get_info": lambda device: (1 << 30, 1 << 31),
        "memory_reserved": lambda device: says.kept,
        "memory_allocated": lambda device: 1 << 19,
        "max_memory_allocated": lambda device: says.peak,
        "reset_peak_memory_stats": lambda device: None,
        "get_arch_list": lambda: ["sm_80", "sm_90", "compute_90"],
        "set_device": lambda index: None,
        "init": lambda: raises("init"),
        "synchronize": lambda: raises("broken"),
        "CUDAGraph": FakeGraph,
        "graph": record,
        "Event": lambda: FakeEvent(says.asked),
        "Stream": lambda device, priority: stream,
        "stream": lambda stream: nullcontext(),
        "current_stream": lambda: stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(polyradix_torch.gpu, "Graphs", Recorded)
    return says


@pytest.fixture
def make(gpu: SimpleNamespace):
    """A backend on it: make(capture)."""

    def backend(capture: bool = True) -> Any:
        out = polyradix_cuda.backend.one(capture, 0)
        out._device, out.device = torch.device("cpu"), "cpu"
        return out

    return backend
