"""TritonOps on CPU tensors, as a backend for the conformance cases."""

from __future__ import annotations

from typing import Any

import torch

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.capabilities import FEATURES, Capabilities
from polyradix.backend.protocol import KV, Array, KVSpec, Memory, ParamSpec, Weight
from polyradix_torch.backend import TorchBackend
from polyradix_torch.sample import sample
from polyradix_torch.triton.attention import tile_rows
from polyradix_torch.triton.moe import Router
from polyradix_torch.triton.ops import TritonOps
from polyradix_torch.triton.rows import argmax, take_previous
from polyradix_torch.triton.upload import upload

CPU = torch.device("cpu")


class Interpreted(TorchBackend):
    """As the CUDA backend runs a step eagerly; decode cuts keys into `splits` parts."""

    def __init__(self, splits: int) -> None:
        caps = Capabilities(
            name="interpreted",
            device="CPU",
            dtypes=frozenset({"float32", "bfloat16"}),
            page_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
            max_head_dim=256,
            head_dim_multiple=2,
            features=FEATURES - {"mla"},
        )
        super().__init__(caps, TritonOps(), "cpu")
        self._splits, self._page, self._dim = splits, 16, (64, 4)

    def memory(self) -> Memory:
        return Memory(1 << 30, 1 << 31)

    def _experts(self, spec: ParamSpec, weight: torch.Tensor) -> Weight:
        return weight

    def _router(self, spec: ParamSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> Weight:
        return Router.of(weight, bias)

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        self._page, self._dim = spec.page_size, (spec.head_dim, 2 if spec.dtype == "bfloat16" else 4)
        return super().alloc_kv(spec, pages)

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> Any:
        batch.check_prev(prev)
        meta, source = upload(batch, self._page, tile_rows(*self._dim), self._splits, CPU)
        if prev is not None:
            take_previous(meta.tokens, source, prev)
        return meta

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        with torch.inference_mode():
            return sample(logits, batch, argmax)
