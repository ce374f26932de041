"""Attention through the vendor's ops, in the form that takes the head size.

The fused op takes several layouts. TND packs all sequences into one call, but takes few head sizes; in BSND and BSH,
sequences of one new token share a call and every longer one has its own. Where the fused op takes a head size in none
of them, ATB's op reads the cache for single new tokens, and torch does the rest. Which form works depends on CANN: each
that it should have is tried once for a head size, before the first use.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from polyradix.backend.protocol import AttnSpec, Heads
from polyradix_npu import calls
from polyradix_npu.meta import NpuMeta

log = logging.getLogger(__name__)

KV = tuple[torch.Tensor, torch.Tensor]  # of one layer, [pages, page, heads, D]
SINK_SIZE = 128  # the largest head with which the fused op takes sinks
SIZES = range(16, 513, 16)
# Form, the major version of CANN that brought it, and head sizes; the first that works is taken. TND of 128 and 192 is
# documented with torch-npu 2.10 and 2.13, of 64 it was reported with CANN 9 (vllm-ascend issue 9632). ATB's op takes
# block_size * head_size up to 128 * 128.
TABLE = (
    ("TND", 8, (128, 192)),
    ("TND", 9, (64,)),
    ("BSND", 8, SIZES),
    ("BSH", 8, SIZES),
    ("ATB", 8, range(16, 129, 16)),
)
ROWS = 512  # of queries at a time, in torch: scores are as many times keys and heads
CAPTURED = ("TND", "BSND", "BSH")  # forms of single tokens whose lengths a graph is given anew


@dataclass(frozen=True)
class Sinks:
    """Scores [Hq] float32, and as the fused op takes them, in bfloat16, if that loses nothing."""

    scores: torch.Tensor
    exact: torch.Tensor | None


@dataclass(frozen=True)
class Forms:
    """Of one head size: the form for sequences of one new token, and for longer ones, in which TND has all."""

    single: str
    longer: str


class Fused:
    """Attention in bfloat16 on a device with this CANN, '' if unknown, over pages of `page` tokens."""

    def __init__(self, mask: torch.Tensor, cann: str, page: int) -> None:
        self.mask, self._page = mask, page
        self._major = int(cann.split(".")[0]) if cann[:1].isdigit() else max(since for _, since, _ in TABLE)
        self._forms: dict[int, Forms] = {}

    def forms(self, dim: int) -> Forms:
        """What works for heads of `dim`."""
        if dim not in self._forms:
            named = [form for form, since, sizes in TABLE if since <= self._major and dim in sizes]
            longer = next((form for form in named if form != "ATB" and self._works(form, dim, 2)), "torch")
            rest = ["TND"] if longer == "TND" else [form for form in named if form != "TND"]
            single = next((form for form in rest if self._works(form, dim, 1)), "torch")
            self._forms[dim] = Forms(single, longer)
            if single not in CAPTURED or longer == "torch":
                log.warning("heads of %d: single tokens attend in %s, longer prompts in %s", dim, single, longer)
        return self._forms[dim]

    def _works(self, form: str, dim: int, rows: int) -> bool:
        def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.mask.device)

        kv, a = (zeros(1, self._page, 1, dim), zeros(1, self._page, 1, dim)), AttnSpec(Heads(1, 1, dim), 1.0)
        pages, q = zeros(1, 1, dtype=torch.int32), zeros(rows, 1, dim)
        with suppress(OSError, RuntimeError, ValueError):  # OSError: the library of an op is not installed
            if form == "TND":
                self._packed(q, kv, pages, [0, rows], [rows], a)
            elif rows == 1:
                _singles(form, q, kv, pages, pages[0], [1], a)
            else:
                self._longer(form, q, kv, pages, rows, a)
            torch.npu.synchronize()  # another thread may launch it
            return True
        return False

    def attend(self, q: torch.Tensor, kv: KV, m: NpuMeta, a: AttnSpec) -> torch.Tensor:
        """q [T,Hq,D], whose keys and values are in the cache already -> [T,Hq*D]."""
        forms = self.forms(a.heads.dim)
        if forms.longer == "TND":
            return self._packed(q, kv, m.pages, m.rows, m.kv_len, a).flatten(1)
        if forms.single not in CAPTURED:
            m.read_lengths()
        if len(q) == len(m.kv_len):
            return _singles(forms.single, q, kv, m.pages, m.newest, m.kv_len, a).flatten(1)
        return self._by_sequence(forms, q, kv, m, a).flatten(1)

    def _packed(
        self, q: torch.Tensor, kv: KV, pages: torch.Tensor, rows: list[int], kv_len: list[int], a: AttnSpec
    ) -> torch.Tensor:
        return _call(q, kv, pages, kv_len, "TND", a, **self._masked(a), actual_seq_qlen=rows[1:])

    def _masked(self, a: AttnSpec) -> dict[str, Any]:
        if a.window is None:
            return {"sparse_mode": calls.CAUSAL, "atten_mask": self.mask}
        return {"sparse_mode": calls.BAND, "atten_mask": self.mask, "pre_tokens": a.window - 1, "next_tokens": 0}

    def _by_sequence(self, forms: Forms, q: torch.Tensor, kv: KV, m: NpuMeta, a: AttnSpec) -> torch.Tensor:
        spans = [slice(*m.rows[s : s + 2]) for s in range(len(m.kv_len))]
        ones = [s for s, span in enumerate(spans) if span.stop - span.start == 1]
        out = torch.empty_like(q)
        if ones:
            at = torch.tensor([[spans[s].start for s in ones], ones], dtype=torch.int32).to(q.device)
            asked, newest = q.index_select(0, at[0]), m.newest.index_select(0, at[1])
            pages, lengths = m.pages.index_select(0, at[1]), [m.kv_len[s] for s in ones]
            out[at[0].long()] = _singles(forms.single, asked, kv, pages, newest, lengths, a)
        for s, span in enumerate(spans):
            if span.stop - span.start > 1:
                out[span] = self._longer(forms.longer, q[span], kv, m.pages[s : s + 1], m.kv_len[s], a)
        return out

    def _longer(
        self, form: str, q: torch.Tensor, kv: KV, pages: torch.Tensor, length: int, a: AttnSpec
    ) -> torch.Tensor:
        """The newest n tokens of one sequence, q [n,Hq,D]."""
        if form == "torch":
            return plain(q, kv, pages, [0, len(q)], [length], a)
        return _call(q[None], kv, pages, [length], form, a, **self._masked(a))[0]


def _singles(
    form: str, q: torch.Tensor, kv: KV, pages: torch.Tensor, newest: torch.Tensor, kv_len: list[int], a: AttnSpec
) -> torch.Tensor:
    """One new token a sequence, q [S,Hq,D]; windows need a mask of their own, as sparse modes have no effect on a
    single row. ATB's op has no windows and no sinks."""
    if form == "ATB" and a.window is None and a.sinks is None:
        return calls.attend_singles(q, kv, pages, kv_len, a.heads.q, a.heads.kv, a.scale)
    if form in ("ATB", "torch"):
        return plain(q, kv, pages, list(range(len(q) + 1)), kv_len, a)
    more: dict[str, Any] = {}
    if a.window is not None:
        keys = torch.arange(pages.shape[1] * kv[0].shape[1], dtype=torch.int32, device=q.device)
        more["atten_mask"] = (keys[None] <= newest[:, None] - a.window)[:, None, None]
    return _call(q[:, None], kv, pages, kv_len, form, a, **more)[:, 0]


def _call(
    q: torch.Tensor, kv: KV, pages: torch.Tensor, kv_len: list[int], layout: str, a: AttnSpec, **more: Any
) -> torch.Tensor:
    """The fused op in `layout`: q and the output [T,Hq,D] in TND, else [B,n,Hq,D]."""
    flat, sinks = (kv[0].flatten(2), kv[1].flatten(2)), a.sinks
    more |= {"block_table": pages, "block_size": kv[0].shape[1], "actual_seq_kvlen": kv_len}
    if native := sinks is not None and sinks.exact is not None and layout == "TND" and a.heads.dim <= SINK_SIZE:
        more["learnable_sink"] = sinks.exact
    summed, asked = not (sinks is None or native), q.flatten(2) if layout == "BSH" else q
    out, log_sum = calls.attend(asked, flat, layout, a.heads.q, a.heads.kv, a.scale, summed=summed, **more)
    out = out.view(q.shape)
    if sinks is None or native:
        return out
    if layout != "TND":
        log_sum = log_sum.transpose(1, 2)
    return (out * (log_sum - sinks.scores[:, None]).sigmoid()).to(out.dtype)


def plain(
    q: torch.Tensor, kv: KV, pages: torch.Tensor, rows: list[int], kv_len: list[int], a: AttnSpec
) -> torch.Tensor:
    """In torch, in float32, sequence by sequence: q [T,Hq,D], of which sequence s has rows[s] to rows[s + 1]."""
    out = torch.empty_like(q)
    for s, length in enumerate(kv_len):
        first, stop = rows[s : s + 2]
        used = pages[s, : -(-length // kv[0].shape[1])]
        k, v = (cache.index_select(0, used).flatten(0, 1)[:length].transpose(0, 1).float() for cache in kv)
        for start in range(first, stop, ROWS):
            span = slice(start, min(start + ROWS, stop))
            seen = length - stop + span.stop
            asked = q[span].float().unflatten(1, (a.heads.kv, -1)).permute(1, 2, 0, 3)
            out[span] = _sequence(asked, k[:, :seen], v[:, :seen], a).to(q.dtype)
    return out


def _sequence(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, a: AttnSpec) -> torch.Tensor:
    """The newest n tokens: q [Hk,Hq/Hk,n,D], k and v [Hk,L,D] -> [n,Hq,D]."""
    n, length = q.shape[2], k.shape[1]
    seen = torch.ones(n, length, dtype=torch.bool, device=q.device).tril(length - n)
    if a.window is not None:
        seen = seen.triu(length - n - a.window + 1)
    scores = q @ k[:, None].transpose(2, 3) * a.scale
    if a.softcap is not None:
        scores = (scores / a.softcap).tanh() * a.softcap
    scores = scores.masked_fill(~seen, -float("inf"))
    if a.sinks is not None:
        lone = a.sinks.scores.view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, lone], dim=-1)
    return (scores.softmax(-1)[..., :length] @ v[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
