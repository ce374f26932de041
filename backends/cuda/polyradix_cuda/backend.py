"""The host side of the CUDA backend."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import FEATURES, Capabilities
from polyradix.backend.protocol import (
    KV,
    Array,
    Compiled,
    HostArray,
    KVSpec,
    Limits,
    Memory,
    Params,
    Step,
)
from polyradix_torch.backend import TorchBackend
from polyradix_torch.host import to_numpy, torch_dtype
from polyradix_torch.sample import sample
from polyradix_torch.triton.attention import tile_rows
from polyradix_torch.triton.capture import Graphs, StaticBatch
from polyradix_torch.triton.ops import GpuMeta, TritonOps
from polyradix_torch.triton.rows import argmax, take_previous
from polyradix_torch.triton.upload import upload

OLDEST = (8, 0)  # the first compute capability with bfloat16 products


@dataclass(frozen=True)
class Decode:
    """A batch that was loaded for a graph."""

    static: StaticBatch
    seqs: int


class Pending(Future[HostArray]):
    """A copy to the host under way; the caller's thread waits for it, not a worker."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._host.copy_(x, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def done(self) -> bool:
        return bool(self._event.query())

    def result(self, timeout: float | None = None) -> HostArray:
        self._event.synchronize()
        return to_numpy(self._host)


class CudaBackend(TorchBackend):
    """One GPU. Decode steps replay graphs; steps with prefill run eagerly."""

    def __init__(self, index: int, capture: bool) -> None:
        device = torch.device("cuda", index)
        self._device, self._capture = device, capture
        self._limits: Limits | None = None
        self._static: StaticBatch | None = None
        self._page, self._dim = 16, (128, 2)  # of the cache made last; its head size and bytes of one value
        properties = torch.cuda.get_device_properties(device)
        self._processors = properties.multi_processor_count
        caps = Capabilities(
            name="cuda",
            device=properties.name,
            dtypes=frozenset({"bfloat16", "float32"}),
            page_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
            max_head_dim=256,
            head_dim_multiple=2,
            features=FEATURES,
            step_tokens=8192,
            async_launch=True,
            notes=(f"torch {torch.__version__}, decode {'captured' if capture else 'eager'}",),
        )
        super().__init__(caps, TritonOps(), str(device))

    def memory(self) -> Memory:
        free, total = torch.cuda.mem_get_info(self._device)
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return Memory(free=free + kept, total=total)

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        self._page, self._dim = spec.page_size, (spec.head_dim, torch_dtype(spec.dtype).itemsize)
        return super().alloc_kv(spec, pages)

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Any:
        batch.check_prev(prev)
        if self._capture and self._limits is not None and batch.num_tokens == batch.num_seqs <= self._limits.max_seqs:
            return self._load(batch, self._limits, prev)
        meta, source = upload(batch, self._page, tile_rows(*self._dim), 4, self._device)
        if prev is not None:
            take_previous(meta.tokens, source, prev)
        return meta

    def _load(self, batch: HostBatch, limits: Limits, prev: Array | None) -> Decode:
        if self._static is None or (self._static.most, self._static.page) != (limits.max_seqs, self._page):
            self._static = StaticBatch(limits, self._page, self._device)
        self._static.load(batch)
        if prev is not None:
            tokens, source = (self._static.fields[name][: batch.num_seqs] for name in ("tokens", "from_prev"))
            take_previous(tokens, source, prev)
        return Decode(self._static, batch.num_seqs)

    def compile(self, step: Step, limits: Limits) -> Compiled:
        ops, self._limits = self.ops, limits
        graphs = Graphs(step, ops, self._processors)

        def run(params: Params, kv: KV, meta: Decode | GpuMeta) -> tuple[Array, KV]:
            with torch.inference_mode():
                if isinstance(meta, Decode):
                    return graphs(params, kv, meta.static, meta.seqs), kv
                return step(ops, params, kv, meta)

        return run

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        with torch.inference_mode():
            return sample(logits, batch, argmax)

    def fetch(self, x: Array) -> Future[HostArray]:
        with torch.inference_mode():
            return Pending(x)


def create(capture: bool, index: int) -> CudaBackend:
    """Raises RuntimeError, saying what is wrong with the GPU or its driver."""
    if not torch.cuda.is_available():
        raise RuntimeError(
            f"torch {torch.__version__} sees no GPU: is its CUDA build installed, and the driver new enough?"
        )
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise ValueError(f"index is {index}; expected 0 to {count - 1}")
    have = torch.cuda.get_device_capability(index)
    if have < OLDEST:
        raise RuntimeError(f"GPU {index} has compute capability {have[0]}.{have[1]}; expected at least 8.0")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return CudaBackend(index, capture)
