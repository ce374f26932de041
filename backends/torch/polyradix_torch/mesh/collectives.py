"""Collectives over a process group of torch.distributed, in the order in which the current stream reaches them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

Join = Callable[[dist.Store, int, int], Any]  # (store, rank, size) -> a process group, called by every rank


def gloo(store: dist.Store, rank: int, size: int) -> Any:
    """Between processes of one host, over its loopback."""
    made: Any = dist.ProcessGroupGloo
    options = made._Options()
    options._devices = [made.create_device(hostname="127.0.0.1")]
    return made(store, rank, size, options)


def nccl(store: dist.Store, rank: int, size: int) -> Any:
    """Between GPUs; on AMD's this is RCCL. Errors are the mesh's to see to: torch would end the process."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    made: Any = dist.ProcessGroupNCCL
    return made(store, rank, size, made.Options())


class TorchCollectives:
    """Collectives of `rank`. `calls` counts them: ranks whose counts differ have lost each other."""

    def __init__(self, group: Any, rank: int, size: int, device: str) -> None:
        self.group, self.rank, self.size, self.device, self.calls = group, rank, size, device, 0

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.sum(x.clone(memory_format=torch.contiguous_format))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """all_reduce in place, of a contiguous x."""
        self._do("allreduce", [x], options=c10d.AllreduceOptions())
        return x

    def all_gather(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        out = x.new_empty(self.size, *x.shape)
        self._do("_allgather_base", out.view(-1), x.reshape(-1), options=c10d.AllgatherOptions())
        return torch.cat(out.unbind(), axis)

    def reduce_scatter(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        return self.all_reduce(x).chunk(self.size, axis)[self.rank]

    def all_to_all(self, x: torch.Tensor, axis: int) -> torch.Tensor:
        parts = torch.stack(x.chunk(self.size, axis))
        out = torch.empty_like(parts)
        self._do("alltoall_base", out, parts, [], [], options=c10d.AllToAllOptions())
        return torch.cat(out.unbind(), axis)

    def broadcast(self, x: torch.Tensor, root: int) -> torch.Tensor:
        return self.send(x.clone(memory_format=torch.contiguous_format), root)

    def send(self, x: torch.Tensor, root: int) -> torch.Tensor:
        """broadcast in place, of a contiguous x."""
        options = c10d.BroadcastOptions()
        options.rootRank = root
        self._do("broadcast", [x], options=options)
        return x

    def permute(self, x: torch.Tensor, to: Sequence[int]) -> torch.Tensor:
        if sorted(to) != list(range(self.size)):
            raise ValueError(f"permute to {list(to)}; expected each rank from 0 to {self.size - 1} once")
        x = x.contiguous()
        out = torch.empty_like(x)
        source, rows = list(to).index(self.rank), x.numel()
        received, sent = ([rows * (r == peer) for r in range(self.size)] for peer in (source, to[self.rank]))
        self._do("alltoall_base", out.view(-1), x.view(-1), received, sent, options=c10d.AllToAllOptions())
        return out

    def barrier(self) -> None:
        self.sum(torch.zeros(1, device=self.device))

    def _do(self, verb: str, *args: Any, options: Any) -> None:
        self.calls += 1
        options.asyncOp = False
        work = getattr(self.group, verb)(*args, options)
        if work is not None:
            work.wait()
