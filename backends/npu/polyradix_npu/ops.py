"""The contract's verbs over the vendor's fused ops; float32, which fused attention does not take, attends in torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expansions
from polyradix.backend.protocol import (
    AttnSpec,
    Gate,
    Index,
    IndexSpec,
    LatentSpec,
    LatentWeights,
    MoeSpec,
    MoeWeights,
)
from polyradix_npu import calls, latent
from polyradix_npu.attention import Fused, plain
from polyradix_torch.moe import Router, route, share
from polyradix_torch.ops import GATES, Linear, TorchMeta, TorchOps


@dataclass(frozen=True)
class Experts:
    """[experts,in,out]: whole experts' matrices, as the grouped product takes them; biases float32 [experts,out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class NpuOps(TorchOps):
    """Ops. A layer's KV is a pair of tensors [pages, page, kv_heads, D], or one of latent rows that the fused op does
    not take; all are changed in place."""

    def __init__(self, fused: Fused) -> None:
        super().__init__(invariant=False)
        self._fused = fused

    def embed(self, w: torch.Tensor, m: TorchMeta) -> torch.Tensor:
        return F.embedding(m.tokens, w)

    def rms_norm(self, x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        return calls.rms_norm(x, w, eps)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if w.dtype != x.dtype:  # as of norms whose weights have an offset, which are float32
            return Expansions.add_rms_norm(self, x, residual, w, eps)
        return calls.add_rms_norm(x, residual, w, eps)

    def rope(
        self, q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, m: TorchMeta
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if id(table) not in m.rope:
            cos, sin = table.index_select(0, m.positions).chunk(2, dim=-1)
            m.rope[id(table)] = torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)
        cos, sin = m.rope[id(table)]
        return calls.rotate(q.float(), cos, sin).to(q.dtype), calls.rotate(k.float(), cos, sin).to(k.dtype)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: Any, m: Any, a: AttnSpec) -> Any:
        m = m.of(kv)
        calls.write(k, v, kv, m.slots)
        if q.dtype == torch.float32 or a.softcap is not None:
            m.read_lengths()
            return plain(q, kv, m.pages, m.rows, m.kv_len, a).flatten(1), kv
        return self._fused.attend(q, kv, m, a), kv

    def attend_latent(self, q: torch.Tensor, c: torch.Tensor, kv: Any, m: Any, w: LatentWeights, a: LatentSpec) -> Any:
        nope, turned = q.view(len(q), -1, a.nope + a.rope).split([a.nope, a.rope], dim=-1)
        turned, key = self.rope(turned, c[:, None, a.rank :], w.table, m)
        row = self.rms_norm(c[:, : a.rank], w.norm, a.eps)
        if a.attn_scale:
            t = 1 + a.attn_scale * (1 + m.positions // a.floor_scale).float().log()
            nope, turned = ((x * t[:, None, None]).to(q.dtype) for x in (nope, turned))
        if len(kv) == 1:
            m.read_lengths()
            (cache,) = kv
            cache.view(-1, cache.shape[-1]).index_copy_(0, m.slots.long(), torch.cat([row, key[:, 0]], dim=1))
            out = latent.plain(nope, turned, kv, m, w.up, a)
        else:
            calls.write(row[:, None], key, kv, m.slots)
            if len(q) == len(m.kv_len):
                out = latent.absorb(nope, turned, kv, m, w.up, a)
            else:
                out = latent.expand(nope, turned, kv, m, w.up, a, self._fused.mask)
        return out.flatten(1), kv

    def attend_sparse(
        self, q: torch.Tensor, c: torch.Tensor, x: Index, kv: Any, m: Any, w: LatentWeights, a: LatentSpec, s: IndexSpec
    ) -> Any:
        """In torch."""
        m.read_lengths()
        m = replace(m, slots=m.slots.long(), pages=m.pages.long())
        return super().attend_sparse(q, c, x, kv, m, LatentWeights(w.norm, w.up.float(), w.table), a, s)

    def gated(self, x: torch.Tensor, kind: Gate) -> torch.Tensor:
        if kind == "silu":
            return calls.swiglu(x)
        if kind != "gelu_tanh":
            raise Unsupported("gated", f"kind is {kind!r}; expected one of {', '.join(GATES)}")
        gate, up = x.float().chunk(2, dim=-1)
        return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)

    def moe(self, x: torch.Tensor, w: MoeWeights, s: MoeSpec) -> torch.Tensor:
        w, first = share(w)
        ids, weights = _route(w.router, x, s)
        some = range(s.experts) if first is None else range(first, first + len(w.down.weight))
        rows, where, counts = calls.by_expert(x, ids, s.experts, some)
        sums = counts.cumsum(0)
        both = calls.grouped(rows, w.gate_up.weight, sums, w.gate_up.bias)
        inner = calls.swiglu(both) if s.limit is None else calls.clamped(both, s.limit, s.alpha)
        made = calls.grouped(inner, w.down.weight, sums, w.down.bias)
        if first is None:
            return calls.combine(made.float(), weights, where).to(x.dtype)
        return _combined(made.float(), weights, where.view(ids.shape))

    def logits(self, x: torch.Tensor, w: Linear, softcap: float | None = None) -> torch.Tensor:
        out = w(x)
        return out if softcap is None else out.div_(softcap).tanh_().mul_(softcap)

    def last(self, x: torch.Tensor, m: TorchMeta) -> torch.Tensor:
        return x.index_select(0, m.last)


def _combined(rows: torch.Tensor, weights: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """The sum [T,H] over the choices whose `where` [T,k] is not -1. The op takes no -1, and rows that nobody made may
    hold anything: such a choice counts a row of its own token with weight 0, and a token without any is 0."""
    here = where >= 0
    any_row = torch.where(here, where, -1).amax(1, keepdim=True).clamp(min=0)
    out = calls.combine(rows, weights * here, torch.where(here, where, any_row).flatten())
    return out.masked_fill(~here.any(1, keepdim=True), 0)


def _route(router: Router, x: torch.Tensor, s: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int32 [T,top_k], best first, and weights float32. In torch, what the vendor's gates do not compute."""
    logits, bias, softmax = router.logits(x), router.bias, s.scoring == "softmax"
    if s.bias == "logits" and bias is not None:
        logits, bias = logits + bias, None
    if softmax and s.groups == 1 and bias is None:
        weights, ids = calls.gate_softmax(logits, s.top_k)
    elif (softmax or s.renormalise) and s.experts // s.groups > 2 and s.group_best <= 2:
        scale = 1.0 if softmax else s.scale
        weights, ids = calls.gate(logits, s.top_k, bias, not softmax, s.groups, s.top_groups, s.group_best == 2, scale)
    else:
        ids, weights = route(logits, bias, s)
        return ids.int(), weights
    if softmax and s.renormalise:
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return ids, weights * s.scale if softmax else weights
