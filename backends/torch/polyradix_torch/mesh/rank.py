"""What one rank does: an ordinary backend of one device over its shards, and verbs that join what ranks have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import (
    KV,
    Array,
    AttnSpec,
    Compiled,
    Heads,
    HostArray,
    Index,
    IndexSpec,
    KVSpec,
    LatentSpec,
    LatentWeights,
    Limits,
    Memory,
    Meta,
    MoeSpec,
    MoeWeights,
    Ops,
    Params,
    ParamSpec,
    Reader,
    Weight,
)
from polyradix.backend.record import Program
from polyradix.backend.shard import local_param
from polyradix_torch.backend import TorchBackend
from polyradix_torch.host import to_torch
from polyradix_torch.mesh.collectives import TorchCollectives
from polyradix_torch.mesh.messages import Layout, Window
from polyradix_torch.moe import Some


@dataclass(frozen=True)
class Columns:
    """Of a linear_reduce, this rank's columns; the bias comes after the sum."""

    weight: Weight
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Rows:
    """Of logits, this rank's rows, of `whole` in all."""

    weight: Weight
    whole: int


class RankOps:
    """The verbs of a rank's own Ops, over its heads and experts. What reduces or gathers follows from the weight."""

    def __init__(self, ops: Any, collectives: TorchCollectives) -> None:
        self._ops, self._collectives, self._tp = ops, collectives, collectives.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def linear_reduce(self, x: torch.Tensor, w: Any) -> torch.Tensor:
        if not isinstance(w, Columns):
            whole: torch.Tensor = self._ops.linear_reduce(x, w)
            return whole
        out = self._collectives.sum(self._ops.linear_reduce(x, w.weight).contiguous())
        return out if w.bias is None else (out + w.bias).to(out.dtype)

    def qkv(self, x: torch.Tensor, w: Any, heads: Heads) -> Any:
        return self._ops.qkv(x, w, self._heads(heads))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: KV, m: Meta, a: AttnSpec) -> Any:
        return self._ops.attend(q, k, v, kv, m, replace(a, heads=self._heads(a.heads)))

    def attend_latent(self, q: torch.Tensor, c: torch.Tensor, kv: KV, m: Meta, w: LatentWeights, a: LatentSpec) -> Any:
        return self._ops.attend_latent(q, c, kv, m, w, replace(a, heads=a.heads // self._tp))

    def attend_sparse(
        self, q: torch.Tensor, c: torch.Tensor, x: Index, kv: KV, m: Meta, w: LatentWeights, a: LatentSpec, s: IndexSpec
    ) -> Any:
        return self._ops.attend_sparse(q, c, x, kv, m, w, replace(a, heads=a.heads // self._tp), s)

    def moe(self, x: torch.Tensor, w: MoeWeights, s: MoeSpec) -> torch.Tensor:
        out: torch.Tensor = self._ops.moe(x, w, s)
        return self._collectives.sum(out).to(x.dtype) if isinstance(w.down, Some) else out

    def logits(self, x: torch.Tensor, w: Any, softcap: float | None = None) -> torch.Tensor:
        if not isinstance(w, Rows):
            whole: torch.Tensor = self._ops.logits(x, w, softcap)
            return whole
        return self._collectives.all_gather(self._ops.logits(x, w.weight, softcap), 1)[:, : w.whole]

    def _heads(self, heads: Heads) -> Heads:
        return Heads(heads.q // self._tp, heads.kv // self._tp, heads.dim)


class Taught:
    """A step that is compiled before it is known. It is taught in time for its first run, and again for new Params."""

    def __init__(self, backend: TorchBackend, collectives: TorchCollectives, limits: Limits) -> None:
        self.program: Program | None = None
        self._collectives = collectives
        self.run: Compiled | None = backend.compile(self._step, limits)

    def _step(self, ops: Ops, params: Params, kv: KV, m: Meta) -> tuple[Array, KV]:
        assert self.program is not None
        return self.program(ops, self._collectives, params, kv, m)


class Rank:
    """Every call is made on all ranks, in one order. A cache is changed in place, as torch backends do."""

    def __init__(self, backend: TorchBackend, group: Any, rank: int, tp: int, window: Window | None = None) -> None:
        self.backend, self.rank, self.tp, self._window = backend, rank, tp, window
        self.collectives = TorchCollectives(group, rank, tp, backend.device)
        self._steps = WeakSet[Taught]()
        backend.ops = RankOps(backend.ops, self.collectives)

    def meet(self) -> None:
        """Raises RuntimeError if the ranks do not find each other. What collectives need is made here."""
        one = torch.ones(1, device=self.backend.device)
        if (found := int(self.collectives.sum(one).item())) != self.tp:
            raise RuntimeError(f"ranks sum to {found}; expected {self.tp}")

    def memory(self) -> Memory:
        return self.backend.memory()

    def pack(self, spec: ParamSpec, read: Reader) -> Weight:
        """`read` gives this rank's shards of what `spec` is the whole of."""
        local = local_param(spec, self.tp)
        if spec.shard_axis is None:
            return self.backend.pack(local, read)
        if spec.kind == "linear_reduce":
            bias = to_torch(read("bias"), self.backend.device) if spec.bias else None
            return Columns(self.backend.pack(replace(local, bias=False), read), bias)
        packed = self.backend.pack(local, read)
        if spec.kind == "logits":
            return Rows(packed, spec.shape[0])
        return Some(packed, self.rank * local.shape[0]) if spec.kind == "experts" else packed

    def unpack(self, spec: ParamSpec, layout: Layout) -> Weight:
        """As pack, of what is in the window."""
        assert self._window is not None
        parts = self._window.read(layout)
        return self.pack(spec, lambda part="weight": parts[part])

    def params(self, top: dict[str, Weight], layers: list[dict[str, Weight]]) -> Params:
        return Params(top, layers)

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        """`spec` is of one rank."""
        return self.backend.alloc_kv(spec, pages)

    def prepare(self, batch: HostBatch, samples: int, prev: torch.Tensor | None = None) -> Meta:
        """Rank 0 has `prev`, the last `samples` samples; the others get them from it, on the device."""
        if samples:
            with torch.inference_mode():
                if prev is None:
                    prev = torch.empty(samples, dtype=torch.int32, device=self.backend.device)
                self.collectives.send(prev.contiguous(), 0)
        return self.backend.prepare(batch, prev)

    def compile(self, limits: Limits) -> Taught:
        step = Taught(self.backend, self.collectives, limits)
        self._steps.add(step)
        return step

    def teach(self, step: Taught, program: Program) -> None:
        step.program = program

    def run(self, step: Taught, params: Params, kv: KV, meta: Meta) -> Array:
        assert step.run is not None, "the mesh has ended"
        return step.run(params, kv, meta)[0]

    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> None:
        self.backend.copy_pages(kv, src, dst)

    def export_pages(self, kv: KV, pages: Sequence[int]) -> HostArray:
        return self.backend.export_pages(kv, pages).result()

    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> None:
        self.backend.import_pages(kv, pages, data)

    def calls(self) -> int:
        return self.collectives.calls

    def forget(self) -> None:
        """Steps, with their graphs."""
        for step in list(self._steps):
            step.run = None

    def abort(self) -> None:
        """Ends collectives under way. NCCL ends them at once, and returns when no graph has any in it."""
        self.collectives.group.abort()
