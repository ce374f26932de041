"""Attention through the vendor's fused op, in the layout that takes the head size.

TND packs all sequences into one call, but takes few head sizes; which, depends on CANN, so each is tried at start-up.
Every other size goes in BSND: sequences of one new token in one call, every longer one in a call of its own.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from polyradix.backend.protocol import AttnSpec
from polyradix_npu import calls
from polyradix_torch.ops import TorchMeta

KV = tuple[torch.Tensor, torch.Tensor]  # of one layer, [pages, page, heads, D]
SINK_SIZE = 128  # the largest head with which the fused op takes sinks
# Head sizes to try in TND by the CANN that brought them: 128 and 192 are documented with torch-npu 2.10 and 2.13, 64
# was reported with CANN 9 (vllm-ascend issue 9632).
TND_SIZES = ((8, (128, 192)), (9, (64,)))


@dataclass(frozen=True)
class Sinks:
    """Scores [Hq] float32, and as the fused op takes them, in bfloat16, if that loses nothing."""

    scores: torch.Tensor
    exact: torch.Tensor | None


@dataclass(frozen=True)
class Fused:
    """What attention needs to know of its device."""

    mask: torch.Tensor
    tnd: frozenset[int]

    def attend(self, q: torch.Tensor, kv: KV, m: TorchMeta, a: AttnSpec) -> torch.Tensor:
        """q [T,Hq,D], whose keys and values are in the cache already -> [T,Hq*D]."""
        if a.heads.dim in self.tnd:
            out = _call(q, kv, m.pages, m.kv_len, "TND", a, **self._masked(a), actual_seq_qlen=m.rows[1:])
        else:
            out = self._by_sequence(q, kv, m, a)
        return out.reshape(len(q), -1)

    def _masked(self, a: AttnSpec) -> dict[str, Any]:
        if a.window is None:
            return {"sparse_mode": calls.CAUSAL, "atten_mask": self.mask}
        return {"sparse_mode": calls.BAND, "atten_mask": self.mask, "pre_tokens": a.window - 1, "next_tokens": 0}

    def _by_sequence(self, q: torch.Tensor, kv: KV, m: TorchMeta, a: AttnSpec) -> torch.Tensor:
        if len(q) == len(m.kv_len):
            return _singles(q, kv, m.pages, m.positions, m.kv_len, a)
        spans = [slice(*m.rows[s : s + 2]) for s in range(len(m.kv_len))]
        ones = [s for s, span in enumerate(spans) if span.stop - span.start == 1]
        out = torch.empty_like(q)
        if ones:
            at = torch.tensor([[spans[s].start for s in ones], ones], dtype=torch.int32).to(q.device)
            asked, positions = q.index_select(0, at[0]), m.positions.index_select(0, at[0])
            pages, lengths = m.pages.index_select(0, at[1]), [m.kv_len[s] for s in ones]
            out[at[0].long()] = _singles(asked, kv, pages, positions, lengths, a)
        for s, span in enumerate(spans):
            if span.stop - span.start > 1:
                more = self._masked(a)
                out[span] = _call(q[span][None], kv, m.pages[s : s + 1], m.kv_len[s : s + 1], "BSND", a, **more)[0]
        return out


def _singles(
    q: torch.Tensor, kv: KV, pages: torch.Tensor, positions: torch.Tensor, kv_len: list[int], a: AttnSpec
) -> torch.Tensor:
    """One new token a sequence; windows need a mask of their own, as sparse modes have no effect on a single row."""
    more: dict[str, Any] = {}
    if a.window is not None:
        keys = torch.arange(pages.shape[1] * kv[0].shape[1], dtype=torch.int32, device=q.device)
        more["atten_mask"] = (keys[None] <= positions[:, None] - a.window)[:, None, None]
    return _call(q[:, None], kv, pages, kv_len, "BSND", a, **more)[:, 0]


def _call(
    q: torch.Tensor, kv: KV, pages: torch.Tensor, kv_len: list[int], layout: str, a: AttnSpec, **more: Any
) -> torch.Tensor:
    flat, sinks = (kv[0].flatten(2), kv[1].flatten(2)), a.sinks
    more |= {"block_table": pages, "block_size": kv[0].shape[1], "actual_seq_kvlen": kv_len}
    if native := sinks is not None and sinks.exact is not None and layout == "TND" and a.heads.dim <= SINK_SIZE:
        more["learnable_sink"] = sinks.exact
    summed = not (sinks is None or native)
    out, log_sum = calls.attend(q, flat, layout, a.heads.q, a.heads.kv, a.scale, summed=summed, **more)
    if sinks is None or native:
        return out
    if layout != "TND":
        log_sum = log_sum.transpose(1, 2)
    return (out * (log_sum - sinks.scores[:, None]).sigmoid()).to(out.dtype)


def plain(q: torch.Tensor, kv: KV, m: TorchMeta, a: AttnSpec) -> torch.Tensor:
    """As Fused.attend, in torch and sequence by sequence: for float32, which the fused op does not take."""
    out = torch.empty_like(q)
    for s, length in enumerate(m.kv_len):
        span = slice(*m.rows[s : s + 2])
        used = m.pages[s, : -(-length // kv[0].shape[1])]
        k, v = (cache.index_select(0, used).flatten(0, 1)[:length].transpose(0, 1) for cache in kv)
        out[span] = _sequence(q[span].unflatten(1, (a.heads.kv, -1)).permute(1, 2, 0, 3), k, v, a)
    return out.flatten(1)


def _sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttnSpec) -> torch.Tensor:
    """The newest n tokens: q [Hk,Hq/Hk,n,D], k and v [Hk,L,D] -> [n,Hq,D]."""
    n, length = q.shape[2], k.shape[1]
    seen = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
    if a.window is not None:
        seen = seen.triu(length - n - a.window + 1)
    scores = (q @ k[:, None].transpose(2, 3) * a.scale).masked_fill(~seen, -float("inf"))
    if a.sinks is not None:
        lone = a.sinks.scores.view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, lone], dim=-1)
    return (scores.softmax(-1)[..., :length] @ v[:, None]).permute(2, 0, 1, 3).flatten(1, 2)


def tnd_sizes(mask: torch.Tensor, cann: str, page: int) -> frozenset[int]:
    """Of the head sizes that this CANN, or an unknown one, should take in TND, those with which a call succeeds."""
    major = int(cann.split(".")[0]) if cann[:1].isdigit() else max(since for since, _ in TND_SIZES)
    out = set()
    for size in (size for since, sizes in TND_SIZES if since <= major for size in sizes):
        q = torch.zeros(2, 1, size, dtype=torch.bfloat16, device=mask.device)
        cache = torch.zeros(1, page, size, dtype=torch.bfloat16, device=mask.device)
        pages = torch.zeros(1, 1, dtype=torch.int32, device=mask.device)
        paged = {"block_table": pages, "block_size": page, "actual_seq_qlen": [2], "actual_seq_kvlen": [2]}
        with suppress(RuntimeError, ValueError):
            calls.attend(q, (cache, cache), "TND", 1, 1, 1.0, **paged, sparse_mode=calls.CAUSAL, atten_mask=mask)
            torch.npu.synchronize()  # another thread may launch it
            out.add(size)
    return frozenset(out)
