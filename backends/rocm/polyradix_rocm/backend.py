"""The host side of the ROCm backend: on an AMD GPU, and emulated with AITER simulated."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from polyradix.backend.batch import HostBatch
from polyradix.backend.capabilities import FEATURES, KV_GROUPS, QUANTS, Capabilities
from polyradix.backend.protocol import (
    KV,
    Array,
    Backend,
    Compiled,
    KVSpec,
    Limits,
    Memory,
    ParamSpec,
    Step,
    Weight,
)
from polyradix_rocm.aiter.calls import Aiter
from polyradix_rocm.aiter.installed import NoAiter, installed, summary
from polyradix_rocm.device import arch_of, check_torch
from polyradix_rocm.ops import AiterVerbs, Experts, Router, TorchAiterOps, TritonAiterOps
from polyradix_rocm.plan import PlannedMeta, PlannedTorchMeta, plan
from polyradix_rocm.selftest import quick
from polyradix_rocm.simulator import Simulator
from polyradix_torch.backend import TorchBackend
from polyradix_torch.errors import all_told
from polyradix_torch.gpu import GpuBackend, on_gpus, use_gpu
from polyradix_torch.ops import TorchMeta
from polyradix_torch.triton.ops import GpuMeta, TritonOps

log = logging.getLogger(__name__)


class AiterHost(TorchBackend):
    """Mixed into a backend: weights and batches as AiterVerbs want them. `ops` without AITER leave all as it is."""

    _page_size = 16  # of the cache made last

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._verbs = self.ops if isinstance(self.ops, AiterVerbs) else None  # which `ops` may come to wrap
        if self._verbs:
            self.wide = frozenset()

    def _experts(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        plain = super()._experts(spec, weight, bias)
        return Experts(weight, plain) if bias is None and self._verbs else plain

    def _router(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        plain = super()._router(spec, weight, bias)
        return Router(weight, bias, plain) if self._verbs else plain

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        self._page_size = spec.page_size
        return super().alloc_kv(spec, pages)

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Any:
        meta = super().prepare(batch, prev)
        if self._verbs and isinstance(meta, TorchMeta):
            return self._planned(PlannedTorchMeta, meta, batch)
        if self._verbs and isinstance(meta, GpuMeta) and batch.num_tokens > batch.num_seqs:
            return self._planned(PlannedMeta, meta, batch)
        return meta  # decodes on a GPU, captured or not, are planned there

    def _planned(self, kind: Any, meta: Any, batch: HostBatch) -> Any:
        first, *plans = (plan(table, self._page_size, self.device) for table in batch.by_group)
        others = tuple(kind(**vars(m), plan=p) for m, p in zip(meta.others, plans, strict=True))
        return kind(**vars(meta) | {"others": others}, plan=first)

    def compile(self, step: Step, limits: Limits) -> Compiled:
        if self._verbs:
            self._verbs.most = limits.max_context
        return super().compile(step, limits)


@all_told(torch.cuda)
class RocmBackend(AiterHost, GpuBackend):
    """A GPU that torch calls cuda: AMD's, or any while AITER is simulated."""

    def __init__(self, index: int, capture: bool, aiter: Aiter | None, note: str) -> None:
        ops = TritonOps() if aiter is None else TritonAiterOps(aiter)
        super().__init__("rocm", FEATURES | QUANTS | {"kv_fp8", KV_GROUPS}, ops, index, capture)
        self.caps = _noted(self.caps, note, aiter)


class CpuBackend(AiterHost, TorchBackend):
    """AITER simulated on a CPU, with torch in place of the Triton kernels."""

    def __init__(self, aiter: Aiter, note: str) -> None:
        caps = Capabilities(
            name="rocm",
            device=f"CPU, as {aiter.provider.arch}",
            dtypes=frozenset({"bfloat16", "float32"}),
            page_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
            max_head_dim=256,
            head_dim_multiple=2,
            features=FEATURES | QUANTS | {"kv_fp8", KV_GROUPS},
        )
        super().__init__(_noted(caps, note, aiter), TorchAiterOps(aiter), "cpu")

    def memory(self) -> Memory:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return Memory(total // 2, total)


def _noted(caps: Capabilities, note: str, aiter: Aiter | None) -> Capabilities:
    emulated = aiter is not None and isinstance(aiter.provider, Simulator)
    most = 1 if emulated else caps.max_tp
    return replace(caps, emulated=emulated, max_tp=most, notes=(*caps.notes, note))


def create(capture: bool, index: int, tp: int) -> Backend:
    """On AMD's GPU `index`, or on `tp` of them from that on. Raises RuntimeError, saying what is wrong with the GPU,
    its driver or this torch, and Unsupported for more ranks than there are GPUs."""
    check_torch(torch)
    return on_gpus(partial(one, capture), index, tp)


def one(capture: bool, index: int) -> RocmBackend:
    """A rank's, or the only one."""
    check_torch(torch)
    use_gpu(index)
    arch = arch_of(torch, index)
    try:
        found = installed(arch)
    except NoAiter as error:
        aiter, notes = None, [f"Triton for every verb: {error}"]
    else:
        aiter = Aiter(found)
        notes = [f"Triton instead of {why}" for why in quick(aiter, f"cuda:{index}")]
        notes.insert(0, summary(found))
    note = "; ".join(notes)
    if aiter is None or aiter.unfit:
        log.warning("%s", note)
    return RocmBackend(index, capture, aiter, note)


def emulate(arch: str, version: str, platform: str) -> Backend:
    """With AITER `version` simulated for `arch`, on the GPU that torch has, or the CPU."""
    aiter = Aiter(Simulator(arch, version))
    note = f"AITER {version} for {arch} is simulated: no kernel of AMD's runs"
    if platform == "cpu" or (platform == "auto" and not torch.cuda.is_available()):
        return CpuBackend(aiter, note)
    use_gpu(0)
    return RocmBackend(0, False, aiter, note)
