"""A Backend over plain torch. A vendor package subclasses it: capabilities, memory, and what it has that is faster."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np
import torch

from polyradix.backend.alone import Alone
from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import Capabilities, check_claimed
from polyradix.backend.layered import each_array, layered
from polyradix.backend.protocol import (
    KV,
    Array,
    Collectives,
    Compiled,
    HostArray,
    KVSpec,
    Limits,
    LogProbs,
    Memory,
    Meta,
    Ops,
    Params,
    ParamSpec,
    Reader,
    Step,
    Weight,
)
from polyradix.backend.quant import check_quant
from polyradix.backend.sampling import sample_host
from polyradix_torch.host import done, kv_dtype, movable, to_numpy, to_torch, torch_dtype
from polyradix_torch.indexer import Indexed
from polyradix_torch.moe import Router
from polyradix_torch.ops import Linear, TorchMeta
from polyradix_torch.quant import Codes, QuantLinear


class TorchBackend(ABC):
    """Eager torch on one device. KV: a LayerKV or Indexed for each layer, of [pages, page_size, kv_heads, head_dim]."""

    wide = frozenset({"norm", "latent_up"})  # kinds of parameters that are kept in float32

    def __init__(self, caps: Capabilities, ops: Ops, device: str) -> None:
        self.caps, self.ops, self.device = caps, ops, device
        self.collectives: Collectives = Alone()

    @abstractmethod
    def memory(self) -> Memory: ...

    def _linear(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        """A packed linear or logits weight."""
        return Linear(weight, bias)

    def _experts(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        return [self._linear(spec, each, None if bias is None else bias[e]) for e, each in enumerate(weight)]

    def _router(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        return Router(self._linear(spec, weight, None), bias)

    def _quantised(self, spec: ParamSpec, codes: Codes, bias: torch.Tensor | None) -> Weight:
        def of(codes: Codes, bias: torch.Tensor | None) -> QuantLinear:
            return QuantLinear(codes, bias, torch_dtype(spec.dtype), partial(self._linear, spec))

        if spec.kind != "experts":
            return of(codes, bias)
        return [of(codes[e], None if bias is None else bias[e]) for e in range(len(codes.codes))]

    def pack(self, spec: ParamSpec, read: Reader) -> Weight:
        torch_dtype(spec.dtype)
        check_quant(spec, self.caps)
        weight = to_torch(read(), self.device)
        bias = to_torch(read("bias"), self.device) if spec.bias else None
        if spec.quant is not None:
            zero = to_torch(read("zero"), self.device) if spec.quant.format == "int4" else None
            return self._quantised(spec, Codes(spec.quant, weight, to_torch(read("scale"), self.device), zero), bias)
        if spec.kind in ("linear", "linear_reduce", "logits"):
            return self._linear(spec, weight, bias)
        if spec.kind == "experts":
            return self._experts(spec, weight, bias)
        if spec.kind == "router":
            return self._router(spec, weight, bias)
        if spec.kind == "norm" and bias is not None:
            return weight.float(), bias.float()
        return weight.float() if spec.kind in self.wide else weight

    def kv_page_bytes(self, spec: KVSpec) -> int:
        per_array = spec.parts * spec.page_size * spec.kv_heads * spec.head_dim
        return per_array * spec.depth * int(kv_dtype(spec.dtype).itemsize)

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        check_claimed(spec, self.caps)
        dtype = kv_dtype(spec.dtype)

        def part(width: int) -> torch.Tensor:
            return torch.zeros((pages, spec.page_size, spec.kv_heads, width), dtype=dtype, device=self.device)

        if spec.index:
            return [Indexed(part(spec.head_dim - spec.index), part(spec.index)) for _ in range(spec.layers)]
        return layered(spec, lambda: (part(spec.head_dim) for _ in range(spec.parts)))

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Meta:
        with torch.inference_mode():
            tokens = self._index(batch.tokens)
            batch.check_prev(prev)
            if prev is not None:
                source = self._index(batch.from_prev)
                tokens = torch.where(source >= 0, prev[source.clamp(min=0)].long(), tokens)
            meta = TorchMeta(
                tokens=tokens,
                positions=self._index(batch.positions),
                slots=self._index(batch.slots),
                last=self._index(batch.last),
                pages=self._index(batch.pages),
                rows=batch.cu_q.tolist(),
                kv_len=batch.kv_len.tolist(),
            )
            return meta.grouped([(self._index(t.slots), self._index(t.pages)) for t in batch.others])

    def _index(self, x: HostArray) -> torch.Tensor:
        return torch.from_numpy(x.astype(np.int64)).to(self.device)

    def compile(self, step: Step, limits: Limits) -> Compiled:
        ops = self.ops

        def run(params: Params, kv: KV, meta: Meta) -> tuple[Array, KV]:
            with torch.inference_mode():
                return step(ops, params, kv, meta)

        return run

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        with torch.inference_mode():
            if batch.greedy and batch.mask is None and batch.adjust is None:
                return logits.argmax(-1).int()
            return torch.from_numpy(sample_host(logits.cpu().numpy(), batch)).to(self.device)

    def logprobs(self, logits: Array, tokens: Array, top: int) -> LogProbs:
        with torch.inference_mode():
            logs = logits.log_softmax(-1)
            values, ids = logs.topk(top, dim=-1)
            return LogProbs(logs.gather(1, tokens.long()[:, None])[:, 0], ids.int(), values)

    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> KV:
        with torch.inference_mode():
            for cache in map(movable, _tensors(kv)):
                cache[list(dst)] = cache[list(src)]
        return kv

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        with torch.inference_mode():
            return done(to_numpy(torch.stack([_exported(parts, list(pages)) for parts in each_array(kv)], dim=1)))

    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> KV:
        with torch.inference_mode():
            for layer, whole in zip(each_array(kv), to_torch(data, self.device).transpose(0, 1), strict=True):
                parts = whole[0].split([x.shape[3] for x in layer], dim=3) if isinstance(layer, Indexed) else whole
                for cache, part in zip(layer, parts, strict=True):
                    movable(cache)[list(pages)] = movable(part)
        return kv

    def fetch(self, x: Array) -> Future[HostArray]:
        return done(to_numpy(x))


def _exported(layer: Any, pages: list[int]) -> torch.Tensor:
    """[part,page,slot,head,dim]"""
    parts = [movable(cache)[pages].view(cache.dtype) for cache in layer]
    return torch.cat(parts, dim=3)[None] if isinstance(layer, Indexed) else torch.stack(parts)


def _tensors(kv: KV) -> list[torch.Tensor]:
    return [cache for layer in each_array(kv) for cache in layer]
