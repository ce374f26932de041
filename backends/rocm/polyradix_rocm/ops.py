"""The contract's verbs over AITER; what it has no kernel for goes to those beneath: Triton's, or on a CPU torch's."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from polyradix.backend.protocol import (
    AttnSpec,
    Index,
    IndexSpec,
    LatentSpec,
    LatentWeights,
    MoeSpec,
    MoeWeights,
    Weight,
)
from polyradix_rocm.aiter.calls import GROUPS, MLA_HEADS, MLA_WIDTH, Aiter
from polyradix_rocm.plan import Part, Plan, planned
from polyradix_torch.moe import Some, route
from polyradix_torch.ops import Linear, TorchOps
from polyradix_torch.triton import rows
from polyradix_torch.triton.ops import TritonOps

log = logging.getLogger(__name__)
BF16 = torch.bfloat16
LOWEST = -3.0e38  # a logit in place of NaN: which experts AITER would choose then, nobody knows


@dataclass(frozen=True)
class Router:
    """weight float32 [E,H], bias float32 [E]; `plain` for the verbs beneath."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    plain: Weight


class Experts:
    """[E,out,in], laid out at first use: only then is it known whether both weights of a layer can be."""

    def __init__(self, weight: torch.Tensor, plain: Weight) -> None:
        self.weight, self.plain, self.ready = weight, plain, False

    def lay_out(self, aiter: Aiter) -> torch.Tensor:
        if not self.ready:
            self.weight, self.plain, self.ready = aiter.shuffled(self.weight), None, True
        return self.weight


def _plain(w: Weight) -> Weight:
    """Of experts, for the verbs beneath."""
    return Some(_plain(w.weight), w.first) if isinstance(w, Some) else getattr(w, "plain", w)


@cache
def served(aiter: Aiter, heads: int) -> bool:
    """Whether AITER has a kernel for latent attention of so many heads. Says it once if not."""
    if aiter.mla_heads(heads) is not None:
        return True
    p, known = aiter.provider, sorted(v for v in MLA_HEADS if heads in MLA_HEADS[v][aiter.provider.arch])
    hint = f"; AITER {', '.join(known)} has one" if known else ""
    log.warning("AITER %s has no kernel for MLA of %d heads on %s: Triton's is used%s", p.version, heads, p.arch, hint)
    return False


if TYPE_CHECKING:
    Beneath = TritonOps
else:
    Beneath = object


class AiterVerbs(Beneath):
    """Mixed into a class of verbs. `most` is the most tokens of one sequence, told before decodes are captured."""

    def __init__(self, aiter: Aiter) -> None:
        super().__init__()
        self.aiter, self.most = aiter, 0
        self._tables: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._planned: tuple[Any, bool, dict[Any, Plan]] | None = None
        self._mla = aiter.has(
            "flash_attn_varlen_func", "concat_and_cache_mla", "get_mla_metadata_info_v1", "get_mla_metadata_v1",
            "mla_decode_fwd",
        )  # fmt: skip

    def rms_norm(self, x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        if not self._norms(x, w, "rmsnorm2d_fwd"):
            return super().rms_norm(x, w, eps)
        return self.aiter.rms_norm(x.contiguous().view(-1, x.shape[-1]), w, eps).view(x.shape)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._norms(x, w, "rmsnorm2d_fwd_with_add"):
            return super().add_rms_norm(x, residual, w, eps)
        return self.aiter.add_rms_norm(x.contiguous(), residual.contiguous(), w, eps)

    def _norms(self, x: torch.Tensor, w: torch.Tensor, name: str) -> bool:
        width = x.shape[-1]
        return x.dtype == w.dtype == BF16 and width % 8 == 0 and width <= 8192 and self.aiter.has(name)

    def rope(self, q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, m: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if q.dtype != BF16 or not self.aiter.has("rope_cached_positions_2c_fwd"):
            return super().rope(q, k, table, m)
        if id(table) not in self._tables:
            cos, sin = (half.contiguous() for half in table.chunk(2, dim=1))
            self._tables[id(table)] = cos, sin, table  # which is kept, so that its id stays its own
        return self.aiter.rope(q, k, *self._tables[id(table)][:2], m.positions.long())

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: Any, m: Any, a: AttnSpec) -> Any:
        decode = self._decodes(m) and a.window is None and self._decodes_in(a)
        if {q.dtype, kv[0].dtype} != {BF16} or a.sinks is not None or not (decode or self._prefills_in(a)):
            return super().attend(q, k, v, kv, m, a)
        own = m.of(kv)
        self._write(k, v, kv, own)
        part = self._plan(m, own, kv[0].shape[1], a.window).whole
        flat = tuple(cache.view(-1, 1, *cache.shape[2:]) for cache in kv)
        rest, q, cap = (part.indptr, part.slots, part.ones), q.contiguous(), a.softcap or 0.0
        if decode:
            out = self.aiter.decode(q, flat, *rest, part.longest[1], a.scale, cap)
        else:
            out = self.aiter.prefill(q, flat, part.cu_q, *rest, part.longest, a.scale, cap, a.window)
        return out.flatten(1), kv

    def _decodes_in(self, a: AttnSpec) -> bool:
        group = a.heads.q // a.heads.kv
        return a.heads.dim in (64, 128) and group <= 16 and self.aiter.has("paged_attention_ragged")

    def _prefills_in(self, a: AttnSpec) -> bool:
        dims = (128,) if self.aiter.provider.version == "0.1.10" else (128, 256)
        return a.heads.dim in dims and self.aiter.has("mha_batch_prefill_func")

    def attend_latent(self, q: torch.Tensor, c: torch.Tensor, kv: Any, m: Any, w: LatentWeights, a: LatentSpec) -> Any:
        if q.dtype != BF16 or (a.rank, a.rope) != MLA_WIDTH or not self._mla or not served(self.aiter, a.heads):
            return super().attend_latent(q, c, kv, m, LatentWeights(w.norm, self._up(w.up), w.table), a)
        (cache,) = kv
        nope, turned = q.view(len(q), a.heads, -1).split([a.nope, a.rope], dim=-1)
        turned, key = self.rope(turned, c[:, None, a.rank :], w.table, m)
        latent = self.rms_norm(c[:, : a.rank], w.norm, a.eps)
        self.aiter.write_latent(latent, key[:, 0], cache[:, :, 0], m.slots.long())
        if a.attn_scale:
            t = 1 + a.attn_scale * (1 + m.positions // a.floor_scale).float().log()
            nope, turned = ((x * t[:, None, None]).to(BF16) for x in (nope, turned))
        plan, out = self._plan(m, m, cache.shape[1]), q.new_empty(len(q), a.heads, a.v)
        for part, run in ((plan.single, self._absorbed), (plan.many, self._expanded)):
            if part is not None:
                at = slice(None) if part.rows is None else part.rows
                out[at] = run(nope[at], turned[at], cache, w.up, part, a)
        return out.flatten(1), kv

    def _absorbed(
        self, nope: torch.Tensor, turned: torch.Tensor, cache: torch.Tensor, up: torch.Tensor, p: Part, a: LatentSpec
    ) -> torch.Tensor:
        heads = self.aiter.mla_heads(a.heads)
        assert heads is not None
        asked = nope.new_zeros(len(nope), heads, a.rank + a.rope)
        asked[:, : a.heads, : a.rank] = torch.bmm(nope.transpose(0, 1), up[:, : a.nope]).transpose(0, 1)
        asked[:, : a.heads, a.rank :] = turned
        if heads not in p.work:
            p.work[heads] = self.aiter.mla_work(p.cu_q, p.indptr, p.ones, heads)
        flat = cache.view(-1, 1, 1, cache.shape[-1])
        mean = self.aiter.mla_decode(asked, flat, p.cu_q, p.indptr, p.slots, p.ones, a.scale, p.work[heads])
        mean = mean[:, : a.heads].transpose(0, 1)
        return torch.bmm(mean, up[:, a.nope :].transpose(1, 2)).transpose(0, 1)

    def _expanded(
        self, nope: torch.Tensor, turned: torch.Tensor, cache: torch.Tensor, up: torch.Tensor, p: Part, a: LatentSpec
    ) -> torch.Tensor:
        held = cache.view(-1, cache.shape[-1])[p.slots]
        made = F.linear(held[:, : a.rank], up.flatten(0, 1)).view(len(held), a.heads, -1)
        key, value = made.split([a.nope, a.v], dim=-1)
        key = torch.cat([key, held[:, None, a.rank :].expand(-1, a.heads, -1)], dim=-1)
        return self.aiter.varlen(torch.cat([nope, turned], dim=-1), key, value, p.cu_q, p.indptr, p.longest, a.scale)

    def moe(self, x: torch.Tensor, w: MoeWeights, s: MoeSpec) -> torch.Tensor:
        router: Router = w.router
        plain_silu = s.bias == "choice" and s.limit is None
        if not (plain_silu and isinstance(w.gate_up, Experts) and self._takes(x, w)):
            return super().moe(x, MoeWeights(router.plain, _plain(w.gate_up), _plain(w.down)), s)
        logits = F.linear(x.float(), router.weight).nan_to_num(LOWEST)
        ids, weights = self._route(logits, router.bias, s)
        gate_up, down = (part.lay_out(self.aiter) for part in (w.gate_up, w.down))
        return self.aiter.fused_moe(x.contiguous(), gate_up, down, ids, weights)

    def _takes(self, x: torch.Tensor, w: MoeWeights) -> bool:
        whole = not any(n % 128 for n in w.down.weight.shape[1:])
        return x.dtype == BF16 and whole and self.aiter.has("shuffle_weight", "fused_moe")

    def _route(self, logits: torch.Tensor, bias: torch.Tensor | None, s: MoeSpec) -> tuple[torch.Tensor, torch.Tensor]:
        grouped, groups = s.groups in GROUPS, (s.groups, s.top_groups)
        biased = (bias is not None, s.scoring, s.renormalise, s.group_best) == (True, "sigmoid", True, 2)
        if biased and grouped and bias is not None and self.aiter.has("biased_grouped_topk"):
            return self.aiter.topk_biased(logits, bias, s.top_k, groups, s.scale)
        softmax = s.scoring == "softmax"
        if bias is None and softmax and s.groups == 1 and s.scale == 1 and self.aiter.has("topk_softmax"):
            return self.aiter.topk_softmax(logits, s.top_k, s.renormalise)
        if bias is None and grouped and s.group_best == 1 and self.aiter.has("grouped_topk"):
            return self.aiter.topk_grouped(logits, s.top_k, groups, s.renormalise, softmax, s.scale)
        ids, weights = route(logits, bias, s)
        return ids.int(), weights

    def _plan(self, m: Any, own: Any, page: int, window: int | None = None) -> Plan:
        """Of batch m as `own`, the meta of one of its groups, has it."""
        if hasattr(own, "plan"):
            return own.plan  # type: ignore[no-any-return]
        # A plan made before a capture would not be made again by a replay.
        capturing = m.tokens.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._planned is None or self._planned[0] is not m or self._planned[1] != capturing:
            self._planned = m, capturing, {}
        plans, key = self._planned[2], (id(own), window)
        if key not in plans:
            plans[key] = planned(own.paged, page, self.most, window)
        return plans[key]

    def _decodes(self, m: Any) -> bool:
        return not hasattr(m, "plan") or m.plan.many is None

    def _write(self, k: torch.Tensor, v: torch.Tensor, kv: Any, m: Any) -> None:
        rows.write(k, v, kv, m.slots)

    def _up(self, up: torch.Tensor) -> torch.Tensor:
        """A latent_up for the verb beneath."""
        return up


class TritonAiterOps(AiterVerbs, TritonOps):
    """On a GPU."""


class TorchAiterOps(AiterVerbs, TorchOps):  # type: ignore[misc]  # beneath are TorchOps, not TritonOps
    """On a CPU, where torch stands for the Triton kernels."""

    def logits(self, x: torch.Tensor, w: Linear, softcap: float | None = None) -> torch.Tensor:
        return super().logits(x.float(), Linear(w.weight.float(), None), softcap)

    def attend_sparse(
        self, q: torch.Tensor, c: torch.Tensor, x: Index, kv: Any, m: Any, w: LatentWeights, a: LatentSpec, s: IndexSpec
    ) -> Any:
        return super().attend_sparse(q, c, x, kv, m, LatentWeights(w.norm, w.up.float(), w.table), a, s)

    def _write(self, k: torch.Tensor, v: torch.Tensor, kv: Any, m: Any) -> None:
        for part, new in zip(kv, (k, v), strict=True):
            part.view(-1, *part.shape[2:]).index_copy_(0, m.slots, new)

    def _up(self, up: torch.Tensor) -> torch.Tensor:
        return up.float()
