"""The host side of the Ascend backend. Imported when torch-npu is there, real or over the stand-ins."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import torch
import torch_npu
from torch_npu.utils.collect_env import get_cann_version

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import FEATURES, KV_GROUPS, Capabilities, check_claimed
from polyradix.backend.protocol import (
    KV,
    Array,
    Backend,
    Compiled,
    HostArray,
    KVSpec,
    Limits,
    Memory,
    Params,
    ParamSpec,
    Reader,
    Step,
    Weight,
)
from polyradix_npu import calls, latent, mesh
from polyradix_npu.attention import TABLE, Fused, Sinks
from polyradix_npu.graphs import FIELDS, Decode, Graphs, StaticBatch, sizes
from polyradix_npu.meta import NpuMeta, grouped, held
from polyradix_npu.ops import Experts, NpuOps
from polyradix_torch.backend import TorchBackend
from polyradix_torch.errors import all_told, told
from polyradix_torch.host import to_torch, torch_dtype
from polyradix_torch.indexer import Indexed
from polyradix_torch.memory import remaining, settled
from polyradix_torch.moe import Router
from polyradix_torch.ops import Linear
from polyradix_torch.pending import Pending
from polyradix_torch.sample import sample

PAGE = 128  # tokens: the only page size that every form of the fused op takes


@all_told(torch.npu)
class NpuBackend(TorchBackend):
    """One Ascend device. Decode steps in bfloat16 replay graphs if `capture`; all others run eagerly."""

    def __init__(self, index: int, capture: bool, emulated: bool) -> None:
        device = torch.device("npu", index)
        cann = get_cann_version()
        self._fused = Fused(calls.fixed_mask(device), cann, PAGE)
        self._capture, self._groups = capture, 1  # of the cache made last
        self._limits: Limits | None = None
        self._static: StaticBatch | None = None
        self._still: int | None = None  # bytes that weights and cache take, without any step
        packed = [size for form, _, sizes in TABLE if form == "TND" for size in sizes]
        packed = [size for size in packed if self._fused.forms(size).longer == "TND"]
        caps = Capabilities(
            name="npu",
            device=torch.npu.get_device_name(index),
            dtypes=frozenset({"bfloat16", "float32"}),
            page_sizes=(PAGE,),
            max_head_dim=512,
            head_dim_multiple=16,
            features=FEATURES | {KV_GROUPS},
            step_tokens=4096,
            async_launch=True,
            mem_fraction=0.9,
            decode_sizes=sizes(256) if capture else (1,),
            max_tp=mesh.SIMULATED if emulated else torch.npu.device_count() - index,
            emulated=emulated,
            notes=(
                f"torch-npu {torch_npu.__version__}, CANN {cann or 'unknown'}, decode "
                + ("captured" if capture else "eager"),
                f"head sizes that share one attention call (TND): {', '.join(map(str, packed)) or 'none'}",
            ),
        )
        super().__init__(caps, NpuOps(self._fused), str(device))

    def memory(self) -> Memory:
        return remaining(torch.npu, self.device, self._still)

    def pack(self, spec: ParamSpec, read: Reader) -> Weight:
        if spec.kind in ("norm", "latent_up") and not spec.bias:
            torch_dtype(spec.dtype)
            return to_torch(read(), self.device)
        if spec.kind == "sinks":
            scores = to_torch(read(), "cpu")
            exact = scores.bfloat16()
            same = bool((exact == scores).all())
            return Sinks(scores.to(self.device), exact.to(self.device) if same else None)
        return super().pack(spec, read)

    def _linear(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        if spec.kind == "logits":
            return Linear(weight.float(), bias)  # rounding logits to bfloat16 would make ties
        return Linear(_fractal(weight), bias)

    def _experts(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        return Experts(_fractal(weight.transpose(1, 2).contiguous()), None if bias is None else bias.float())

    def _router(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        return Router(Linear(weight, None), bias)

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        check_claimed(spec, self.caps)
        full, bf16 = spec.kind == "full", spec.dtype == "bfloat16"
        split = bf16 and not full and not spec.index and spec.head_dim == latent.RANK + latent.ROPE
        self._groups = max(1, len(spec.groups))
        if full and bf16:
            with torch.inference_mode():
                self._fused.forms(spec.head_dim)  # while there is room to try them
        kv = self._latent_kv(spec, pages) if split else super().alloc_kv(spec, pages)
        self._still = settled(torch.npu, self.device)
        return kv

    def _latent_kv(self, spec: KVSpec, pages: int) -> KV:
        shapes = [(pages, spec.page_size, 1, width) for width in (latent.RANK, latent.ROPE)]
        dtype = torch_dtype(spec.dtype)
        return [tuple(torch.zeros(s, dtype=dtype, device=self.device) for s in shapes) for _ in range(spec.layers)]

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        if not _split(kv):
            return super().export_pages(kv, pages)
        with torch.inference_mode():
            picked = [(torch.cat([cache[list(pages)] for cache in layer], dim=-1),) for layer in kv]
            return super().export_pages(picked, range(len(pages)))

    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> KV:
        if not _split(kv):
            return super().import_pages(kv, pages, data)
        super().import_pages([layer[:1] for layer in kv], pages, data[..., : latent.RANK])
        super().import_pages([layer[1:] for layer in kv], pages, data[..., latent.RANK :])
        return kv

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Decode | NpuMeta:
        batch.check_prev(prev)
        limits = self._limits
        with torch.inference_mode():
            if self._capture and limits is not None and batch.num_tokens == batch.num_seqs <= limits.max_seqs:
                return self._load(batch, limits, prev)
            groups = held(batch, PAGE)
            fields = [batch.tokens, batch.positions, batch.last, batch.from_prev]
            for g in groups:
                fields += [g.slots, g.kv_len - 1, g.pages]
            host = torch.from_numpy(np.concatenate([x.ravel() for x in fields]))
            tokens, positions, last, source, *of_group = host.to(self.device).split([x.size for x in fields])
            if prev is not None:
                tokens = _taken(tokens, source, prev)
            each = [
                {"slots": slots, "newest": newest, "pages": pages.view(g.pages.shape), "kv_len": g.kv_len.tolist()}
                for g, slots, newest, pages in zip(groups, of_group[::3], of_group[1::3], of_group[2::3], strict=True)
            ]
            rows = batch.cu_q.tolist()
            first = NpuMeta(tokens=tokens, positions=positions, last=last, rows=rows, **each[0])
            return grouped(first, each[1:])

    def _load(self, batch: HostBatch, limits: Limits, prev: Array | None) -> Decode:
        if self._static is None or (self._static.limits, self._static.groups) != (limits, self._groups):
            self._static = StaticBatch(limits, PAGE, self.device, self._groups)
        loaded = self._static.load(batch)
        if prev is not None:
            tokens, _, source = self._static.lines[: len(FIELDS), : batch.num_seqs]
            tokens.copy_(_taken(tokens, source, prev))
        return loaded

    def compile(self, step: Step, limits: Limits) -> Compiled:
        ops, self._limits = self.ops, limits
        graphs = Graphs(step, ops)

        def run(params: Params, kv: KV, meta: Decode | NpuMeta) -> tuple[Array, KV]:
            with torch.inference_mode():
                if isinstance(meta, Decode):
                    return graphs(params, kv, meta), kv
                return step(ops, params, kv, meta)[0], kv  # changed in place; graphs are of this very list

        return told(torch.npu, run)

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        with torch.inference_mode():
            return sample(logits, batch, lambda x: x.argmax(-1).int())

    def fetch(self, x: Array) -> Future[HostArray]:
        with torch.inference_mode():
            return Pending(x, torch.npu)


def create(capture: bool, index: int, emulated: bool, tp: int) -> Backend:
    """Raises ValueError for an index that names no device, and as mesh.ranks."""
    count = torch.npu.device_count()
    if not 0 <= index < count:
        raise ValueError(f"index is {index}; expected 0 to {count - 1}")
    torch.npu.set_device(index)
    if not emulated:
        return NpuBackend(index, capture, False) if tp == 1 else mesh.ranks(capture, index, tp)
    if tp > 1:
        from polyradix_npu.emulate import mesh as simulation

        return simulation.ranks(capture, tp)
    from polyradix_npu.emulate.graphs import simulated

    backend: Backend = simulated(lambda: NpuBackend(index, capture, True))
    return backend


def _fractal(weight: torch.Tensor) -> torch.Tensor:
    return calls.fractal(weight) if weight.dtype == torch.bfloat16 else weight


def _taken(tokens: torch.Tensor, source: torch.Tensor, prev: torch.Tensor) -> torch.Tensor:
    """Tokens, where `source` names a row of `prev` that row's."""
    return torch.where(source >= 0, prev.index_select(0, source.clamp(min=0)), tokens)


def _split(kv: KV) -> bool:
    """Whether a latent cache is two tensors."""
    return len(kv[0]) == 2 and kv[0][0].shape != kv[0][1].shape and not isinstance(kv[0], Indexed)
