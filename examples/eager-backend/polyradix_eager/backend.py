"""The host side: placement, layouts, batches and launches. README.md has the order in which to write the methods."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future

import ml_dtypes
import numpy as np
import torch
from polyradix.backend.alone import Alone
from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import FEATURES, Capabilities, Unsupported, check_claimed
from polyradix.backend.protocol import (
    Collectives,
    Compiled,
    HostArray,
    KVSpec,
    Limits,
    LogProbs,
    Memory,
    Ops,
    Params,
    ParamSpec,
    Reader,
    Step,
)
from polyradix.backend.quant import check_quant
from polyradix.backend.sampling import sample_host
from torch import Tensor

from polyradix_eager.ops import Batch, EagerOps, LayerKV, Packed

DEVICE = "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class EagerBackend:
    """A KV is a list of (k, v), one pair of tensors per layer, changed in place."""

    ops: Ops
    collectives: Collectives

    def __init__(self) -> None:
        self.ops = EagerOps()
        self.collectives = Alone()  # of one rank
        self.caps = Capabilities(
            name="eager",
            device=f"torch {torch.__version__} on {DEVICE}",
            dtypes=frozenset(DTYPES),
            page_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
            max_head_dim=256,
            head_dim_multiple=2,
            features=FEATURES - {"sinks", "gelu_tanh", "moe", "moe_bias", "moe_clamp", "mla", "indexer"},
        )

    def memory(self) -> Memory:
        """Of the host, which is the device here."""
        free, total = (os.sysconf("SC_PAGE_SIZE") * os.sysconf(n) for n in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
        return Memory(free, total)

    def pack(self, spec: ParamSpec, read: Reader) -> Packed:
        """Into the backend's own layout, placed on the device."""
        if spec.dtype not in DTYPES:
            raise Unsupported(f"dtype {spec.dtype}", f"parameter {spec.name}; expected one of {sorted(DTYPES)}")
        check_quant(spec, self.caps)
        return Packed(self._upload(read()), self._upload(read("bias")) if spec.bias else None)

    def kv_page_bytes(self, spec: KVSpec) -> int:
        """Bytes of one page on one device, all layers, k and v."""
        return 2 * spec.layers * spec.page_size * spec.kv_heads * spec.head_dim * DTYPES[spec.dtype].itemsize

    def alloc_kv(self, spec: KVSpec, pages: int) -> list[LayerKV]:
        """Zeroed; `pages` includes scratch page 0."""
        check_claimed(spec, self.caps)
        shape, dtype = (pages, spec.page_size, spec.kv_heads, spec.head_dim), DTYPES[spec.dtype]
        k, v = torch.zeros(2, spec.layers, *shape, dtype=dtype, device=DEVICE)
        return list(zip(k, v, strict=True))

    def prepare(self, batch: HostBatch, prev: Tensor | None = None) -> Batch:
        """prev: i32[S'], the last samples."""
        batch.check_prev(prev)
        tokens = self._index(batch.tokens)
        if prev is not None:
            source = self._index(batch.from_prev)
            tokens = torch.where(source >= 0, prev[source.clamp(min=0)].long(), tokens)
        return Batch(
            tokens=tokens,
            positions=self._index(batch.positions),
            slots=self._index(batch.slots),
            pages=self._index(batch.pages),
            last=self._index(batch.last),
            cu_q=batch.cu_q.tolist(),
            kv_len=batch.kv_len.tolist(),
        )

    def compile(self, step: Step, limits: Limits) -> Compiled:
        """Eager: a step runs as it is."""

        @torch.inference_mode()
        def run(params: Params, kv: list[LayerKV], meta: Batch) -> tuple[Tensor, list[LayerKV]]:
            return step(self.ops, params, kv, meta)

        return run

    def sample(self, logits: Tensor, batch: SampleBatch) -> Tensor:
        """i32[S]; semantics in backend/sampling.py."""
        return torch.from_numpy(sample_host(logits.cpu().numpy(), batch)).to(DEVICE)

    def logprobs(self, logits: Tensor, tokens: Tensor, top: int) -> LogProbs:
        """Of the unscaled logits."""
        logs = logits.log_softmax(-1)
        values, ids = logs.topk(top)
        return LogProbs(logs.gather(1, tokens.long()[:, None])[:, 0], ids.int(), values)

    def copy_pages(self, kv: list[LayerKV], src: Sequence[int], dst: Sequence[int]) -> list[LayerKV]:
        for pair in kv:
            for cache in pair:
                cache[list(dst)] = cache[list(src)]
        return kv

    def export_pages(self, kv: list[LayerKV], pages: Sequence[int]) -> Future[HostArray]:
        """[2(k,v),layer,page,slot,head,dim]."""
        return self.fetch(torch.stack([torch.stack([cache[list(pages)] for cache in part]) for part in zip(*kv)]))

    def import_pages(self, kv: list[LayerKV], pages: Sequence[int], data: HostArray) -> list[LayerKV]:
        """The same form, KVSpec dtype."""
        for pair, new in zip(kv, self._upload(data).unbind(1), strict=True):
            for cache, rows in zip(pair, new, strict=True):
                cache[list(pages)] = rows
        return kv

    def fetch(self, x: Tensor) -> Future[HostArray]:
        """The only device-to-host path; rows beyond S are cut off."""
        host = x.cpu()
        if host.dtype == torch.bfloat16:
            return done(host.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
        return done(host.numpy())

    def _index(self, x: HostArray) -> Tensor:
        return torch.from_numpy(x.astype(np.int64)).to(DEVICE)

    def _upload(self, x: HostArray) -> Tensor:
        """A copy on the device; NumPy's bfloat16 is unknown to torch, so its bits are taken."""
        bits = x.view(np.int16) if x.dtype == ml_dtypes.bfloat16 else x
        out = torch.tensor(bits, device=DEVICE)
        return out.view(torch.bfloat16) if bits is not x else out


def done(value: HostArray) -> Future[HostArray]:
    future: Future[HostArray] = Future()
    future.set_result(value)
    return future
