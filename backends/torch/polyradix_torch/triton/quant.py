"""Experts with weights kept quantised: products grouped by expert. Lists of pairs are those of moe.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyradix.backend.protocol import MoeSpec, MoeWeights
from polyradix_torch.quant import Codes
from polyradix_torch.triton import moe, rows
from polyradix_torch.triton.codes import Cut, chosen_experts, given, native, paired, span, units
from polyradix_torch.triton.early import early, start


@triton.jit(do_not_specialize=["T"])
def _quant(
    x, codes, scale, zero, bias, out, lists, counts, T, E, N, K, EACH, WIDE,
    TALL: tl.constexpr, FOUR: tl.constexpr, BIAS: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, LEFT: tl.constexpr, FOLD: tl.constexpr,
    EVEN: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [pairs/EACH,K], or of pairs of columns if FOUR, codes [E,N,K], two a byte if FOUR -> [pairs,N]."""
    start(EARLY)
    tile, column = tl.program_id(0) // tl.cdiv(N, COLUMNS), tl.program_id(0) % tl.cdiv(N, COLUMNS)
    e, place = tl.arange(0, EP), tl.arange(0, ROWS)
    count = tl.load(counts + e, mask=e < E, other=0)
    tiles = (count + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))
    place += (tile - tl.sum(tl.where(e < expert, tiles, 0))) * ROWS
    mine = place < tl.sum(tl.where(e == expert, count, 0))
    pair = tl.load(lists + expert.to(tl.int64) * T + place, mask=mine, other=0)
    if expert < E:
        n = column * COLUMNS + tl.arange(0, COLUMNS)
        row = tl.minimum(n, N - 1)
        PACK: tl.constexpr = 2 if FOUR else 1
        block = (expert * tl.cdiv(N, TALL) + row // TALL) * tl.cdiv(K, WIDE)
        left = codes + (row.to(tl.int64) + expert.to(tl.int64) * N) * (K // PACK)
        right = x + (pair // EACH).to(tl.int64) * (K // PACK)
        acc = units(right, mine, left, scale, zero, block, K, 0, K, WIDE, out.dtype.element_ty, ROWS, COLUMNS, DEPTH,
                    STEPS, FOUR, LEFT, FOLD, TALL % COLUMNS == 0, EVEN, NATIVE)  # fmt: skip
        if LEFT:
            acc = tl.trans(acc)
        if BIAS:
            acc += tl.load(bias + expert.to(tl.int64) * N + row).to(tl.float32)[None, :]
        to = out + pair.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(to, acc.to(out.dtype.element_ty), mask=mine[:, None] & (n < N)[None, :])


def product(
    x: torch.Tensor, w: Codes, routes: moe.Routes, bias: torch.Tensor | None = None, cut: Cut | None = None
) -> torch.Tensor:
    """x [pairs,K], or [T,K] for the experts of a token alike, times w [E,N,K], plus bias [E,N], of each pair's expert
    -> [pairs,N], summed in float32 and rounded once."""
    (experts, n), k, pairs = w.codes.shape[:2], x.shape[1], routes.weights.numel()
    b = cut or chosen_experts(x, w, routes.each)
    depth = min(b.depth, span(w.quant, k))
    tiles = min(pairs, pairs // b.tokens + experts)
    out = x.new_zeros(pairs, n) if routes.others else x.new_empty(pairs, n)
    _quant[(tiles * triton.cdiv(n, b.rows),)](
        paired(x, w.quant), *given(w),
        out if bias is None else bias, out, routes.lists, routes.counts, routes.lists.shape[1], experts, n, k,
        pairs // max(1, len(x)), w.quant.block[1], w.quant.block[0], w.zero is not None, bias is not None,
        triton.next_power_of_2(experts), b.tokens, b.rows, depth, max(1, b.depth // depth), b.form == "left", b.fold,
        k % b.depth == 0, native(x.device), **early(x.device), num_warps=b.warps, num_stages=b.stages,
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
    return product(x, weight, routes, bias) if isinstance(weight, Codes) else moe.product(x, w, routes, False)


def stays(w: MoeWeights) -> bool:
    """Whether a weight of these experts is kept quantised."""
    return any(isinstance(moe.bare(each), Codes) for each in (w.gate_up, w.down))
