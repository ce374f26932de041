"""Graphs and their task groups, simulated below the vendor's own Python: a capture records calls and runs none, a
replay runs them, and a task whose lists were not given anew since the last replay would wait for ever."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch_npu

from polyradix_npu import contracts
from polyradix_npu.contracts import WrongCall
from polyradix_npu.emulate.device import Call, Recording, SimulatedDevice
from polyradix_npu.emulate.memory import leaves, on_device
from polyradix_torch.errors import CALLS


@dataclass(frozen=True)
class Group:
    """Calls start to stop of a recording, which an update may replace."""

    recording: Recording
    start: int
    stop: int


class ExternalEvent:
    """Set by `record`, cleared by `reset`; what a graph waits for is looked at when it is replayed."""

    device: SimulatedDevice

    def __init__(self) -> None:
        self._set = False

    def record(self, stream: Any = None) -> None:
        self._set = True

    def wait(self, stream: Any = None) -> None:
        _recorded(self.device).append(self._await)

    def reset(self, stream: Any = None) -> None:
        _recorded(self.device).append(self._clear)

    def _await(self) -> None:
        if not self._set:
            raise WrongCall("replay: a task group was not updated since the last one; the device would wait for ever")

    def _clear(self) -> None:
        self._set = False


@cache
def device() -> SimulatedDevice:
    """The one of this process."""
    made = SimulatedDevice()
    install(made)
    return made


def simulated(make: Callable[[], Any]) -> Any:
    """The backend that `make` makes, every call of which runs on the simulated device."""
    inside = device().inside
    backend = inside(make)()
    for name in CALLS:
        setattr(backend, name, inside(getattr(backend, name)))
    compile = backend.compile
    backend.compile = lambda step, limits: inside(compile(step, limits))
    return backend


def install(device: SimulatedDevice) -> None:
    """Puts the simulation under torch.npu.graph, NPUGraph and the task groups, for the life of the process."""
    ExternalEvent.device = device
    torch.npu.ExternalEvent = ExternalEvent
    native, vendor = torch_npu._C._NPUGraph, torch_npu.npu.graphs

    def begin(graph: Any, **options: Any) -> None:
        if device.recording is not None:
            raise WrongCall("capture_begin: a graph is being captured already")
        graph.calls = device.recording = []

    def end(graph: Any) -> None:
        device.recording = None

    def group_begin(stream: Any) -> None:
        device.group = len(_recorded(device))

    def group_end(stream: Any) -> Group:
        recording = _recorded(device)
        return Group(recording, device.group, len(recording))

    def update_begin(stream: Any, group: Group) -> None:
        device.updating = lambda func, args, kwargs: _update(group, func, args, kwargs)

    def update_end(stream: Any) -> None:
        device.updating = None

    native.capture_begin, native.capture_end = begin, end
    native.replay = lambda graph: device.replay(graph.calls)
    native.pool = lambda graph: (0, 1)
    vendor._graph_task_group_begin, vendor._graph_task_group_end = group_begin, group_end
    vendor._graph_task_update_begin, vendor._graph_task_update_end = update_begin, update_end


def _recorded(device: SimulatedDevice) -> Recording:
    if device.recording is None:
        raise WrongCall("a task group or an event's wait outside a capture")
    return device.recording


def _update(group: Group, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    (old,) = group.recording[group.start : group.stop]
    if not isinstance(old, Call) or old.func is not func:
        raise WrongCall(f"graph_task_update: {func} is not the op that was captured")
    where = [[x.data_ptr() for x in leaves(tree) if on_device(x)] for tree in (old.args, old.kwargs, args, kwargs)]
    if where[:2] != where[2:]:
        raise WrongCall(f"graph_task_update: {func} has other tensors than were captured")
    contracts.check(func._schema.name, contracts.bind(func, args, kwargs))
    group.recording[group.start] = Call(func, old.args, {**old.kwargs, **_lists(kwargs)}, old.out)
    return kwargs["out"]


def _lists(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if isinstance(value, list) and name != "out"}
