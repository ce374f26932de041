"""The host side of the CUDA backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
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
    ParamSpec,
    Step,
    Weight,
)
from polyradix_cuda.errors import all_told, told
from polyradix_torch.backend import TorchBackend
from polyradix_torch.host import to_numpy, torch_dtype
from polyradix_torch.sample import sample
from polyradix_torch.triton.attention import tile_rows
from polyradix_torch.triton.capture import Graphs, StaticBatch, sizes
from polyradix_torch.triton.moe import Router
from polyradix_torch.triton.ops import GpuMeta, TritonOps
from polyradix_torch.triton.rows import argmax, take_previous
from polyradix_torch.triton.upload import upload

POLL = 2e-4  # seconds
OLDEST = (8, 0)  # the first compute capability with bfloat16 products


@dataclass(frozen=True)
class Decode:
    """A batch that was loaded for a graph."""

    static: StaticBatch
    seqs: int


class Pending(Future[HostArray]):
    """A copy to the host under way. Whoever asks for its result waits for it, no worker does: it is done when asked, so
    concurrent.futures.wait is not for it."""

    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.set_running_or_notify_cancel()
        self._host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self._host.copy_(x, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def done(self) -> bool:
        with suppress(TimeoutError):
            self._settle(0)
        return super().done()

    def result(self, timeout: float | None = None) -> HostArray:
        self._settle(timeout)
        return super().result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._settle(timeout)
        return super().exception()

    def add_done_callback(self, fn: Callable[[Future[HostArray]], object]) -> None:
        self._settle(None)
        super().add_done_callback(fn)

    def _settle(self, timeout: float | None) -> None:
        if super().done():
            return
        try:
            told(self._wait)(timeout)
        except TimeoutError:
            raise
        except Exception as error:
            self.set_exception(error)
        else:
            self.set_result(to_numpy(self._host))

    def _wait(self, timeout: float | None) -> None:
        if timeout is None:
            self._event.synchronize()
            return
        end = time.monotonic() + timeout
        while not self._event.query():
            if time.monotonic() >= end:
                raise TimeoutError(f"the GPU was not done within {timeout} s")
            time.sleep(POLL)


@all_told
class CudaBackend(TorchBackend):
    """One GPU. Decode steps replay graphs; steps with prefill run eagerly."""

    def __init__(self, index: int, capture: bool) -> None:
        device = torch.device("cuda", index)
        self._device, self._capture = device, capture
        self._limits: Limits | None = None
        self._static: StaticBatch | None = None
        self._page, self._dim = 16, (128, 2)  # of the cache made last; its head size and bytes of one value
        properties = torch.cuda.get_device_properties(device)
        self._still: int | None = None  # bytes that weights and cache take, without any step
        self._processors = properties.multi_processor_count
        caps = Capabilities(
            name="cuda",
            device=properties.name,
            dtypes=frozenset({"bfloat16", "float32"}),
            page_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
            max_head_dim=256,
            head_dim_multiple=2,
            features=FEATURES - {"mla"},
            step_tokens=8192,
            async_launch=True,
            mem_fraction=0.9,
            decode_sizes=tuple(sizes(1024)) if capture else (1,),
            notes=(f"torch {torch.__version__}, decode {'captured' if capture else 'eager'}",),
        )
        super().__init__(caps, TritonOps(), str(device))

    def memory(self) -> Memory:
        """Free is what the driver has and what torch keeps unused, less what the steps since `alloc_kv` needed."""
        free, total = torch.cuda.mem_get_info(self._device)
        kept = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        steps = 0 if self._still is None else torch.cuda.max_memory_allocated(self._device) - self._still
        return Memory(free=free + kept - steps, total=total)

    def _experts(self, spec: ParamSpec, weight: torch.Tensor) -> Weight:
        return weight

    def _router(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        return Router.of(weight, bias)

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        self._page, self._dim = spec.page_size, (spec.head_dim, torch_dtype(spec.dtype).itemsize)
        kv = super().alloc_kv(spec, pages)
        torch.cuda.reset_peak_memory_stats(self._device)
        self._still = torch.cuda.memory_allocated(self._device)
        return kv

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

        @told
        def run(params: Params, kv: KV, meta: Decode | GpuMeta) -> tuple[Array, KV]:
            with torch.inference_mode():
                if isinstance(meta, Decode):
                    return graphs(params, kv, meta.static, meta.seqs), kv
                return step(ops, params, kv, meta)[0], kv  # changed in place; graphs are of this very list

        return run

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        with torch.inference_mode():
            return sample(logits, batch, argmax)

    def fetch(self, x: Array) -> Future[HostArray]:
        with torch.inference_mode():
            return Pending(x)


def create(capture: bool, index: int) -> CudaBackend:
    """Raises RuntimeError, saying what is wrong with the GPU, its driver or this torch."""
    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} cannot use a GPU: {_why_not()}")
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise ValueError(f"index is {index}; expected 0 to {count - 1}")
    have, built = torch.cuda.get_device_capability(index), torch.cuda.get_arch_list()
    what = f"GPU {index} has compute capability {have[0]}.{have[1]}"
    if have < OLDEST:
        raise RuntimeError(f"{what}; expected at least 8.0")
    if not any(_runs(arch, have) for arch in built):
        raise RuntimeError(f"{what}; torch {torch.__version__} was built for {', '.join(built)}: install a newer one")
    torch.cuda.set_device(index)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return CudaBackend(index, capture)


def _why_not() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error)
    return "no reason given"


def _runs(arch: str, have: tuple[int, int]) -> bool:
    """Whether code for `arch` runs: sm_ on its own major version, compute_ (PTX) on any newer."""
    kind, _, digits = arch.partition("_")
    version = int("".join(filter(str.isdigit, digits)) or 0)
    return version <= 10 * have[0] + have[1] and (kind == "compute" or version // 10 == have[0])
