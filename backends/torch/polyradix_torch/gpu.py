"""The host side of TritonOps, and a Backend over torch.cuda, which is what torch calls any GPU that runs its kernels.

A vendor package subclasses GpuBackend, decorates it with `all_told(torch.cuda)`, and overrides what it does better.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import Capabilities, Unsupported
from polyradix.backend.protocol import (
    KV,
    Array,
    Backend,
    Compiled,
    HostArray,
    KVSpec,
    Limits,
    Memory,
    Ops,
    Params,
    ParamSpec,
    Step,
    Weight,
)
from polyradix_torch.backend import TorchBackend
from polyradix_torch.errors import told
from polyradix_torch.host import kv_dtype, torch_dtype
from polyradix_torch.memory import remaining, settled
from polyradix_torch.mesh import Mesh, nccl
from polyradix_torch.pending import Pending
from polyradix_torch.quant import Codes
from polyradix_torch.sample import sample
from polyradix_torch.triton import attention, latent
from polyradix_torch.triton.capture import Graphs, StaticBatch, sizes, splits_for
from polyradix_torch.triton.codes import fits
from polyradix_torch.triton.moe import Biased, Router
from polyradix_torch.triton.ops import GpuMeta, TritonOps
from polyradix_torch.triton.rows import argmax, take_previous
from polyradix_torch.triton.upload import upload


@dataclass(frozen=True)
class Decode:
    """A batch that was loaded for a graph."""

    static: StaticBatch
    seqs: int


class TritonBackend(TorchBackend):
    """Eager TritonOps on one device: the GPU, or a CPU with Triton's interpreter."""

    splits = 4  # parts at most that an eager decode cuts keys into
    # of the cache made last: page size, rows of a prefill's tile, kind, whether decodes may share keys, heads, groups
    _page, _rows, _latent, _share, _kv_heads, _groups = 16, 64, False, True, 1, 1
    wide = frozenset({"norm"})

    def _experts(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        return weight if bias is None else Biased(weight, bias)

    def _quantised(self, spec: ParamSpec, codes: Codes, bias: torch.Tensor | None) -> Weight:
        experts = spec.kind == "experts"
        if not fits(codes.quant, spec.shape[-1]):
            weight = codes.weight().to(torch_dtype(spec.dtype))
            return self._experts(spec, weight, bias) if experts else self._linear(spec, weight, bias)
        if not experts:
            return super()._quantised(spec, codes, bias)
        return codes if bias is None else Biased(codes, bias)

    def _router(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        return Router.of(weight, bias)

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        kv, size = super().alloc_kv(spec, pages), kv_dtype(spec.dtype).itemsize
        self._page, self._latent, self._kv_heads = spec.page_size, spec.kind == "latent", spec.kv_heads
        self._share, self._groups = not spec.index, max(1, len(spec.groups))  # by an index each token selects its own
        self._rows = latent.tile_rows(size) if self._latent else attention.tile_rows(spec.head_dim, size)
        return kv

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Any:
        batch.check_prev(prev)
        splits = self._parts(int(np.count_nonzero(np.diff(batch.cu_q) == 1)))
        meta, source = upload(batch, self._page, self._rows, splits, torch.device(self.device), self._latent)
        if prev is not None:
            take_previous(meta.tokens, source, prev)
        return meta

    def _parts(self, decodes: int) -> int:
        """That these, of an eager step, cut their keys into."""
        return self.splits

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        with torch.inference_mode():
            return sample(logits, batch, argmax)


class GpuBackend(TritonBackend):
    """GPU number `index`. Decode steps replay graphs if `capture`; steps with prefill run eagerly."""

    fork = False  # whether graphs may have a second stream, without a mesh

    def __init__(self, name: str, features: frozenset[str], ops: Ops, index: int, capture: bool) -> None:
        device = torch.device("cuda", index)
        self._device, self._capture = device, capture
        self._limits: Limits | None = None
        self._static: StaticBatch | None = None
        properties = torch.cuda.get_device_properties(device)
        self._still: int | None = None  # bytes that weights and cache take, without any step
        self._processors = properties.multi_processor_count
        caps = Capabilities(
            name=name,
            device=properties.name,
            dtypes=frozenset({"bfloat16", "float32"}),
            page_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
            max_head_dim=256,
            head_dim_multiple=2,
            features=features,
            step_tokens=8192,
            async_launch=True,
            mem_fraction=0.9,
            decode_sizes=tuple(sizes(1024)) if capture else (1,),
            max_tp=torch.cuda.device_count() - index,
            notes=(f"torch {torch.__version__}, decode {'captured' if capture else 'eager'}",),
        )
        super().__init__(caps, ops, str(device))

    def _parts(self, decodes: int) -> int:
        return min(self.splits, splits_for(max(1, decodes * self._kv_heads), self._processors))

    def memory(self) -> Memory:
        return remaining(torch.cuda, self._device, self._still)

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        kv = super().alloc_kv(spec, pages)
        self._still = settled(torch.cuda, self._device)
        return kv

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Any:
        limits = self._limits
        if not self._capture or limits is None or not batch.num_tokens == batch.num_seqs <= limits.max_seqs:
            return super().prepare(batch, prev)
        batch.check_prev(prev)
        which = self._latent, self._share
        kind, s = (limits.max_seqs, self._page, which, self._groups), self._static
        if s is None or (s.most, s.page, s.kind, s.groups) != kind:
            self._static = s = StaticBatch(limits, self._page, self._device, *which, self._groups)
        s.load(batch)
        if prev is not None:
            tokens, source = (s.fields[name][: batch.num_seqs] for name in ("tokens", "from_prev"))
            take_previous(tokens, source, prev)
        return Decode(s, batch.num_seqs)

    def compile(self, step: Step, limits: Limits) -> Compiled:
        ops, self._limits = self.ops, limits
        graphs = Graphs(step, ops, self._processors, self.fork and isinstance(ops, TritonOps))

        def run(params: Params, kv: KV, meta: Decode | GpuMeta) -> tuple[Array, KV]:
            with torch.inference_mode():
                if isinstance(meta, Decode):
                    return graphs(params, kv, meta.static, meta.seqs), kv
                return step(ops, params, kv, meta)[0], kv  # changed in place; graphs are of this very list

        return told(torch.cuda, run)

    def fetch(self, x: Array) -> Future[HostArray]:
        with torch.inference_mode():
            return Pending(x, torch.cuda)


def use_gpu(index: int) -> None:
    """Makes GPU `index` torch's own, with exact products. Raises RuntimeError or ValueError, saying what is wrong with
    the GPU, its driver or the number."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} cannot use a GPU: {_why_not()}")
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise ValueError(f"index is {index}; expected 0 to {count - 1}")
    torch.cuda.set_device(index)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def on_gpus(make: Callable[[int], GpuBackend], index: int, tp: int) -> Backend:
    """What `make` gives for GPU `index`, or a mesh over `tp` GPUs from that on. `make` can be pickled. Raises
    Unsupported where there are fewer, RuntimeError without NCCL or RCCL, and as use_gpu."""
    if tp == 1:
        return make(index)
    use_gpu(index)
    if tp > (here := torch.cuda.device_count() - index):
        raise Unsupported(f"tp {tp}", f"{here} GPU(s) from index {index} on")
    if not dist.is_nccl_available():
        what = f"torch {torch.__version__} is built without {'NCCL' if torch.version.hip is None else 'RCCL'}"
        raise RuntimeError(f"tp {tp}: {what}: install another, or take tp 1")
    return Mesh(partial(_counted, make, index), nccl, tp)


def _counted(make: Callable[[int], GpuBackend], index: int, rank: int) -> GpuBackend:
    return make(index + rank)


def _why_not() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return "no reason given"
