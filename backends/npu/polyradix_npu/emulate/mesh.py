"""Tensor parallelism on simulated devices: a process for each rank, and gloo between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import Backend
from polyradix_npu.device import start
from polyradix_npu.mesh import SIMULATED
from polyradix_torch.backend import TorchBackend
from polyradix_torch.mesh import Mesh, gloo

VERBS = {"allreduce", "_allgather_base", "alltoall_base", "broadcast"}


class Simulated:
    """A gloo group for tensors of the simulated device. A call in a capture becomes a part of the graph."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._group, name)
        return partial(self._call, call) if name in VERBS else call

    def _call(self, call: Callable[..., Any], *args: Any) -> None:
        from polyradix_npu.emulate.graphs import device
        from polyradix_npu.emulate.memory import aliased

        def run() -> None:
            call(*aliased(args)).wait()

        recording = device().recording
        if recording is None:
            run()
        else:
            recording.append(run)


def simulated_hccl(store: dist.Store, rank: int, size: int) -> Simulated:
    return Simulated(gloo(store, rank, size))


def one(capture: bool, rank: int) -> TorchBackend:
    """The backend of a rank; one in a process of its own is on the simulated device for good."""
    start(emulated=True)
    from polyradix_npu.backend import NpuBackend
    from polyradix_npu.emulate.graphs import device

    if rank:
        device().__enter__()
    return NpuBackend(0, capture, True)


def ranks(capture: bool, tp: int) -> Backend:
    """Raises Unsupported for more ranks than are simulated."""
    from polyradix_npu.emulate.graphs import simulated

    if tp > SIMULATED:
        raise Unsupported(f"tp {tp}", f"{SIMULATED} ranks are simulated")
    backend: Backend = simulated(lambda: Mesh(partial(one, capture), simulated_hccl, tp))
    return backend
