"""TorchOps as a backend, alone or as a rank of a mesh: a module of its own, as ranks' processes import it."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from polyradix.backend.capabilities import FEATURES, KV_GROUPS, QUANTS, Capabilities
from polyradix.backend.protocol import KV, Gate, KVSpec, Memory, ParamSpec, Reader, Weight
from polyradix_torch import TorchBackend, TorchOps


class PlainBackend(TorchBackend):
    def __init__(self, ops: TorchOps | None = None) -> None:
        caps = Capabilities(
            "plain",
            "test",
            frozenset({"float32", "bfloat16"}),
            (4, 16),
            256,
            features=FEATURES | QUANTS | {KV_GROUPS},
            max_tp=2,
        )
        super().__init__(caps, ops or TorchOps(), "cpu")

    def memory(self) -> Memory:
        return Memory(1 << 30, 1 << 30)

    def _linear(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        return super()._linear(spec, weight.float() if spec.kind == "logits" else weight, bias)


def plain(rank: int) -> PlainBackend:
    torch.set_num_threads(1)
    return PlainBackend()


class Frail(PlainBackend):
    """Rank 1 has no memory for a cache of more than 9 pages, and its gelu fails. `memory().total` counts weights."""

    def __init__(self, rank: int) -> None:
        super().__init__(FrailOps() if rank else None)
        self._rank, self._packed = rank, weakref.WeakSet[Any]()

    def memory(self) -> Memory:
        return Memory(10 - self._rank, len(self._packed))

    def pack(self, spec: ParamSpec, read: Reader) -> Weight:
        out = super().pack(spec, read)
        self._packed.add(out)
        return out

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        if self._rank and pages > 9:
            raise MemoryError(f"{pages} pages")
        return super().alloc_kv(spec, pages)


class FrailOps(TorchOps):
    def gated(self, x: torch.Tensor, kind: Gate) -> torch.Tensor:
        if kind == "gelu_tanh":
            raise RuntimeError("the gelu broke")
        return super().gated(x, kind)


def frail(rank: int) -> Frail:
    torch.set_num_threads(1)
    return Frail(rank)


def missing(rank: int) -> PlainBackend:
    if rank:
        raise ValueError(f"there is no device {rank}")
    return PlainBackend()
