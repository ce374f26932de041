"""Products with weights kept quantised, of all rows or grouped by expert: codes become the dtype of x, which is exact,
and a block's sum is scaled in float32. Lists of pairs are those of moe.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyradix.backend.protocol import MoeSpec, MoeWeights, Quant
from polyradix_torch.quant import Codes
from polyradix_torch.triton import moe, rows
from polyradix_torch.triton.early import early, start
from polyradix_torch.triton.eight import readable, wide

LEAST = 16  # columns that the matrix units take


@triton.jit(do_not_specialize=["M", "T"])
def _quant(
    x, codes, scale, zero, bias, out, lists, counts, M, T, E, N, K, EACH, WIDE,
    TALL: tl.constexpr, FOUR: tl.constexpr, BIAS: tl.constexpr, ROUTED: tl.constexpr, EP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [M/EACH,K], codes [E,N,K], two a byte if FOUR -> [M,N]. The weight is the left operand: the matrix units take
    64 of its rows. DEPTH columns are in one block."""
    start(EARLY)
    tile, column = tl.program_id(0) // tl.cdiv(N, COLUMNS), tl.program_id(0) % tl.cdiv(N, COLUMNS)
    place = tl.arange(0, ROWS)
    if ROUTED:
        e = tl.arange(0, EP)
        count = tl.load(counts + e, mask=e < E, other=0)
        tiles = (count + ROWS - 1) // ROWS
        expert = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))
        place += (tile - tl.sum(tl.where(e < expert, tiles, 0))) * ROWS
        mine = place < tl.sum(tl.where(e == expert, count, 0))
        pair = tl.load(lists + expert.to(tl.int64) * T + place, mask=mine, other=0)
    else:
        expert = tile * 0
        place += tile * ROWS
        mine = place < M
        pair = tl.minimum(place, M - 1)
    if expert < E:
        n = column * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.minimum(n, N - 1)
        PACK: tl.constexpr = 2 if FOUR else 1
        block = (expert * tl.cdiv(N, TALL) + row // TALL) * tl.cdiv(K, WIDE)
        left = codes + (row.to(tl.int64) + expert * N)[:, None] * (K // PACK)
        right = x + (pair // EACH).to(tl.int64)[:, None] * K
        acc = tl.zeros((COLUMNS, ROWS), tl.float32)
        for k in range(0, K, DEPTH):
            c, p = k + tl.arange(0, DEPTH)[None, :], k // PACK + tl.arange(0, DEPTH // PACK)[None, :]
            if EVEN:
                a, w = tl.load(right + c), tl.load(left + p)
            else:
                a = tl.load(right + c, mask=c < K, other=0.0)
                w = tl.load(left + p, mask=p < K // PACK, other=0.0)
            at = block + k // WIDE
            if FOUR:
                w = tl.reshape(tl.join(w & 15, w >> 4), (COLUMNS, DEPTH)).to(tl.float32)
                w -= tl.load(zero + at).to(tl.float32)[:, None]
            part = tl.dot(wide(w, a.dtype, NAN=False), tl.trans(a), input_precision="ieee")
            acc += part * tl.load(scale + at)[:, None]
        if BIAS:
            acc += tl.load(bias + expert.to(tl.int64) * N + row).to(tl.float32)[:, None]
        to = out + pair.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(to, tl.trans(acc).to(out.dtype.element_ty), mask=mine[:, None] & (n < N)[None, :])


def fits(quant: Quant, width: int) -> bool:
    """Whether the kernel has products for such blocks of a weight of so many columns."""
    return _depth(quant, width) >= LEAST


def _depth(quant: Quant, width: int) -> int:
    """The most columns at a time, a power of two."""
    columns = quant.block[1]
    return 128 if columns >= width else columns & -columns


def product(
    x: torch.Tensor, w: Codes, bias: torch.Tensor | None = None, routes: moe.Routes | None = None
) -> torch.Tensor:
    """x [M,K] times w [N,K], plus bias [N] -> [M,N], summed in float32 and rounded once. With `routes` x [pairs,K], or
    [T,K] for the experts of a token alike, times w [E,N,K], plus bias [E,N], of each pair's expert -> [pairs,N]."""
    x, (n, k) = x.contiguous(), (w.codes.shape[-2], x.shape[1])
    pairs, experts = (len(x), 1) if routes is None else (routes.weights.numel(), len(w.codes))
    b = moe.planned(x, pairs if routes is None else routes.each, gated=False)
    depth = min(b.depth, _depth(w.quant, k))
    tiles = triton.cdiv(pairs, b.rows) if routes is None else min(pairs, pairs // b.rows + experts)
    out = x.new_zeros(pairs, n) if routes is not None and routes.others else x.new_empty(pairs, n)
    lists, counts = (out, out) if routes is None else (routes.lists, routes.counts)
    _quant[(tiles * triton.cdiv(n, b.columns),)](
        x, readable(w.codes), w.scale, w.scale if w.zero is None else w.zero, out if bias is None else bias, out,
        lists, counts, pairs, lists.shape[1], experts, n, k, pairs // max(1, len(x)), *w.quant.block[::-1],
        w.zero is not None, bias is not None, routes is not None, triton.next_power_of_2(experts), b.rows, b.columns,
        depth, k % depth == 0, **early(x.device), num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return out


def experts(x: torch.Tensor, w: MoeWeights, s: MoeSpec, first: int | None = None) -> torch.Tensor:
    """As moe.moe, of which one weight or both are Codes, Biased or not."""
    x = x.contiguous()
    routes = moe.routes_of(x, w, s, first)
    inner = rows.gated(_product(x, w.gate_up, routes), "silu", moe.clamp_of(s))
    return moe.combined(_product(inner, w.down, routes), routes, x.dtype if first is None else torch.float32)


def _product(x: torch.Tensor, w: Codes | torch.Tensor | moe.Biased, routes: moe.Routes) -> torch.Tensor:
    weight, bias = w if isinstance(w, moe.Biased) else (w, None)
    return product(x, weight, bias, routes) if isinstance(weight, Codes) else moe.product(x, w, routes, False)


def stays(w: MoeWeights) -> bool:
    """Whether a weight of these experts is kept quantised."""
    return any(isinstance(moe.bare(each), Codes) for each in (w.gate_up, w.down))
