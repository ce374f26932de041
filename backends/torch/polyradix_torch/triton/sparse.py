"""Latent attention over the rows that an indexer selects: those become pages of one token, and each token of the batch
a sequence of its own that has them.

`_rank` makes of a score and its position one integer, so that the largest are the best scores and of equal ones the
lowest positions, in whatever order torch.topk takes them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from polyradix.backend.protocol import IndexSpec, LatentSpec, LatentWeights
from polyradix_torch.indexer import Indexed
from polyradix_torch.triton import latent
from polyradix_torch.triton.attention import Paged, _precision
from polyradix_torch.triton.latent_prefix import padded

ROOM = 1 << 28  # bytes of scores, or of parts of sums, made at a time; tokens take turns where it is too little
LOW = tl.constexpr(0x7FFFFFFF)
TILE = {2: (64, 128, 4), 4: (16, 32, 8)}  # by bytes of a number: keys of a program, columns at a time, warps


@triton.jit(do_not_specialize=["L"], do_not_specialize_on_alignment=["positions", "seqs", "start", "pages"])
def _rank(
    index, weights, keys, positions, seqs, start, pages, out, L, HEADS: tl.constexpr, HP: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK keys for one query."""
    t, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    h = tl.arange(0, HP)
    known = at <= tl.load(positions + t)
    page = tl.load(pages + tl.load(start + tl.load(seqs + t)) + at // PAGE, mask=known, other=0).to(tl.int64)
    each = tl.zeros((BLOCK, HP), tl.float32)
    for column in range(0, DIM, WIDE):
        d = column + tl.arange(0, WIDE)
        inside = known[:, None] & (d < DIM)[None, :]
        k = tl.load(keys + ((page * PAGE + at % PAGE) * DIM)[:, None] + d[None, :], mask=inside, other=0.0)
        inside = (h < HEADS)[:, None] & (d < DIM)[None, :]
        q = tl.load(index + (t * HEADS + h)[:, None] * DIM + d[None, :], mask=inside, other=0.0)
        each = tl.dot(k, tl.trans(q), each, input_precision=PRECISION)
    score = tl.sum(
        tl.maximum(each, 0.0) * tl.load(weights + t * HEADS + h, mask=h < HEADS, other=0.0).to(tl.float32)[None, :], 1
    )
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(known, tl.where(bits < 0, bits ^ LOW, bits), -LOW - 1)
    tl.store(out + t * L + at, (order.to(tl.int64) << 32) | (LOW - at), mask=at < L)


def attend(
    q: torch.Tensor, c: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, kv: Indexed, positions: torch.Tensor,
    slots: torch.Tensor, at: Paged, context: int, w: LatentWeights, a: LatentSpec, s: IndexSpec,
) -> torch.Tensor:  # fmt: skip
    """Ops.attend_sparse for q [T,H*(nope+rope)], c [T,R+rope], index [T,heads,dim] and weights [T,heads], with keys in
    the cache already: [T,H*v]. `context`: no sequence has more tokens."""
    if a.attn_scale:
        warm = 1 + a.attn_scale * (1 + positions // a.floor_scale).float().log()
        q, a = (q.float() * warm[:, None]).to(q.dtype), replace(a, attn_scale=0.0)
    tokens = torch.arange(len(q), dtype=torch.int32, device=q.device)
    seqs = torch.searchsorted(at.cu_q[1:].contiguous(), tokens, right=True, out_int32=True)
    rows, each = kv.rows.view(-1, 1, 1, kv.rows.shape[3]), max(16 * context, 4 * at.splits * len(w.up) * a.rank)
    step, out = max(1, ROOM // each), []
    for first in range(0, len(q), step):
        part = slice(first, first + step)
        found = _select(index[part], weights[part], kv.keys, positions[part], seqs[part], at, context, s)
        asked = q[part], c[part], rows, positions[part], slots[part]
        out.append(latent.attend(*asked, *_alone(found, positions[part], at.splits), w, a))
    return out[0] if len(out) == 1 else torch.cat(out)


def _select(
    index: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, seqs: torch.Tensor,
    at: Paged, context: int, s: IndexSpec,
) -> torch.Tensor:  # fmt: skip
    """Slots [T,top_k] of the rows that tokens see, the best first; of those beyond a token's own, any."""
    page, ranks = keys.shape[1], torch.empty(len(index), context, dtype=torch.int64, device=keys.device)
    rank(index, weights, keys, positions, seqs, at.page_start, at.pages, ranks)
    best = ranks.topk(min(s.top_k, context)).values
    ids = LOW.value - (best & LOW.value)
    held = at.page_start.long()[seqs.long(), None] + ids // page
    return at.pages[held.clamp(max=len(at.pages) - 1)] * page + (ids % page).int()


def rank(
    index: torch.Tensor, weights: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, seqs: torch.Tensor,
    start: torch.Tensor, pages: torch.Tensor, out: torch.Tensor,
) -> None:  # fmt: skip
    """Into out [T,context] int64: what orders the keys of tokens of sequences `seqs` [T]."""
    (count, heads, dim), context = index.shape, out.shape[1]
    block, wide, warps = TILE[index.element_size()]
    _rank[(count, triton.cdiv(context, block))](
        index, weights, keys, positions, seqs, start, pages, out, context, heads, padded(heads), dim,
        min(wide, padded(dim)), keys.shape[1], block, _precision(index), num_warps=warps,
    )  # fmt: skip


def _alone(found: torch.Tensor, positions: torch.Tensor, splits: int) -> tuple[Paged, latent.Rows]:
    """Each token as a sequence that ends with it."""
    count, most = found.shape
    rows = torch.arange(count + 1, dtype=torch.int32, device=found.device)
    each, none = rows[:count], rows[:0]
    held = (positions + 1).clamp(max=most)
    paged = Paged(rows, held, each * most, found.flatten(), each, splits, none.view(0, 2))
    return paged, latent.Rows(each, none.view(0, 3), none, none)
