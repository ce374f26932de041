"""The contract's verbs over Triton kernels; matrix products of many rows are torch's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import AttnSpec, Gate, Index, IndexSpec, LatentSpec, LatentWeights, MoeSpec, MoeWeights
from polyradix_torch.indexer import Indexed, turned
from polyradix_torch.moe import share
from polyradix_torch.ops import GATES, Linear, Products
from polyradix_torch.quant import QuantLinear
from polyradix_torch.triton import attention, codes, latent, moe, quant, rows, skinny, sparse
from polyradix_torch.triton.attention import Paged


@dataclass(frozen=True)
class GpuMeta:
    """One batch on the device, int32."""

    tokens: torch.Tensor  # [T]
    positions: torch.Tensor  # [T]
    slots: torch.Tensor  # [T]
    last: torch.Tensor  # [S]
    paged: Paged
    latent: latent.Rows
    context: int  # no sequence has more tokens
    others: tuple[GpuMeta, ...] = ()  # the same batch as the groups after the first see it

    def of(self, kv: Any) -> GpuMeta:
        """As the layer with this KV sees the batch."""
        return self.others[kv.group - 1] if self.others and kv.group else self


class TritonOps(Products):
    """Ops. A layer's KV: a LayerKV of tensors [pages, page_size, kv_heads, head_dim], changed in place, or Indexed."""

    def embed(self, w: torch.Tensor, m: GpuMeta) -> torch.Tensor:
        return F.embedding(m.tokens, w)

    def rms_norm(self, x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        return rows.rms_norm(x, w, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rows.add_rms_norm(x, residual, w, eps)

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, m: GpuMeta
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rows.rope(q, k, table, m.positions)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: Any, m: GpuMeta, a: AttnSpec) -> Any:
        m = m.of(kv)
        k, v = rows.write(k, v, kv, m.slots, held=len(m.paged.tiles) > 0)
        return attention.attend(q, k, v, kv, m.paged, a), kv

    def attend_latent(
        self, q: torch.Tensor, c: torch.Tensor, kv: Any, m: GpuMeta, w: LatentWeights, a: LatentSpec
    ) -> Any:
        return latent.attend(q, c, kv[0], m.positions, m.slots, m.paged, m.latent, w, a), kv

    def attend_sparse(
        self, q: torch.Tensor, c: torch.Tensor, x: Index, kv: Indexed, m: GpuMeta, w: LatentWeights, a: LatentSpec,
        s: IndexSpec,
    ) -> Any:  # fmt: skip
        index, key = turned(self.rope, x, w.table, m, a.rope, s)
        kv.keys.view(-1, s.dim).index_copy_(0, m.slots.long(), key)
        if m.context <= s.top_k:
            return latent.attend(q, c, kv.rows, m.positions, m.slots, m.paged, m.latent, w, a), kv
        return sparse.attend(q, c, index, x.weights, kv, m.positions, m.slots, m.paged, m.context, w, a, s), kv

    def linear(self, x: torch.Tensor, w: Linear | QuantLinear) -> torch.Tensor:
        if isinstance(w, QuantLinear):
            return codes.product(x, w.codes, w.bias)
        tile = skinny.chosen("linear", x, w.weight)
        return super().linear(x, w) if tile is None else skinny.product(x, w.weight, w.bias, tile)

    def linear_gated(self, x: torch.Tensor, w: Linear | QuantLinear, kind: Gate) -> torch.Tensor:
        if isinstance(w, QuantLinear) or kind != "silu":
            return super().linear_gated(x, w, kind)
        tile = skinny.chosen("gated", x, w.weight)
        return super().linear_gated(x, w, kind) if tile is None else skinny.product(x, w.weight, w.bias, tile, "gated")

    def gated(self, x: torch.Tensor, kind: Gate) -> torch.Tensor:
        if kind not in GATES:
            raise Unsupported("gated", f"kind is {kind!r}; expected one of {', '.join(GATES)}")
        return rows.gated(x, kind)

    def moe(self, x: torch.Tensor, w: MoeWeights, s: MoeSpec) -> torch.Tensor:
        w, first = share(w)
        return (quant.experts if quant.stays(w) else moe.moe)(x, w, s, first)

    def last(self, x: torch.Tensor, m: GpuMeta) -> torch.Tensor:
        return x[m.last]

    def logits(self, x: torch.Tensor, w: Linear, softcap: float | None = None) -> torch.Tensor:
        out = self._logits(x, w)
        return out if softcap is None else out.div_(softcap).tanh_().mul_(softcap)

    def _logits(self, x: torch.Tensor, w: Linear) -> torch.Tensor:
        tile = skinny.chosen("logits", x, w.weight)
        if tile is not None:
            return skinny.product(x, w.weight, w.bias, tile, "logits")
        if x.is_cuda and x.dtype != torch.float32:
            return torch.mm(x, w.weight.t(), out_dtype=torch.float32)  # never rounded to x's dtype
        return F.linear(x.float(), w.weight.float())
