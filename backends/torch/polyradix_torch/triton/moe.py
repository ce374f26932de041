"""Mixture of experts in five launches of fixed shapes: logits, routes, two products grouped by expert, weighted sum.

A pair is a token and one of its experts, numbered token * top_k + place. `_route` appends each to the list of its
expert, in whatever order programs come, and a product takes tiles of one list. Results lie by pair, so the order in a
list changes no bit, and nothing has to be sorted. Grids are as large as the worst case; programs without a tile end.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from polyradix.backend.protocol import MoeSpec, MoeWeights
from polyradix_torch.triton.cuts import cut
from polyradix_torch.triton.early import early, start
from polyradix_torch.triton.rows import clamped, silu
from polyradix_torch.triton.skinny import TUNED, ask, name_of

LOWEST = tl.constexpr(-3.0e38)  # a choice value that loses to any other, and wins against what is chosen already


@dataclass(frozen=True)
class Blocks:
    """What a program takes at a time: rows of x (pairs, or tokens of the router), rows of the weight, and of their
    columns. `wide`: the weight comes through a tensor descriptor, of 64 rows of x and more."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    wide: bool = False


ROUTER = {  # by the most tokens
    torch.bfloat16: ((256, Blocks(16, 16, 128, 4, 4)), (1 << 31, Blocks(64, 32, 64, 4, 3))),
    torch.float32: ((1 << 31, Blocks(16, 16, 64, 4, 2)),),
}
GATE_UP = {  # by the most pairs that an expert has on average
    torch.bfloat16: (
        (8, Blocks(16, 32, 128, 4, 4)),
        (24, Blocks(32, 64, 64, 4, 4)),
        (64, Blocks(64, 64, 64, 4, 4)),
        (1 << 31, Blocks(128, 64, 64, 8, 3)),
    ),
    torch.float32: ((1 << 31, Blocks(16, 32, 32, 4, 2)),),
}
DOWN = {
    torch.bfloat16: (
        (8, Blocks(16, 64, 128, 4, 4)),
        (24, Blocks(32, 128, 64, 4, 4)),
        (64, Blocks(64, 128, 64, 4, 4)),
        (1 << 31, Blocks(128, 128, 64, 8, 3)),
    ),
    torch.float32: ((1 << 31, Blocks(16, 64, 32, 4, 2)),),
}
Table = dict[torch.dtype, tuple[tuple[int, Blocks], ...]]


class Biased(NamedTuple):
    """Of experts: weight [E,N,K], a tensor or Codes, and bias [E,N]."""

    weight: Any
    bias: torch.Tensor


def bare(w: Any) -> Any:
    """A weight of experts, without a bias."""
    return w.weight if isinstance(w, Biased) else w


@dataclass(frozen=True)
class Router:
    """`parts` bfloat16 [parts,E,H], whose sum is the float32 weight, every bit of it: products with a bfloat16 x are
    then exact. Of a weight that is bfloat16's there is one. `bias` float32 [E]."""

    parts: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Router:
        """weight float32 [E,H]."""
        parts: list[torch.Tensor] = []
        rest = weight
        while not parts or (len(parts) < 3 and bool(rest.any())):
            parts.append(rest.bfloat16())
            rest = rest - parts[-1].float()
        return cls(torch.stack(parts), bias)


@triton.jit
def _multiply(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["T"])
def _logits(
    x, w, out, counts, T, E, H,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    t, e = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    experts = w + tl.minimum(e, E - 1) * H
    if EARLY and x.dtype.element_ty == tl.bfloat16:  # the weight is asked for before x is there
        for part in tl.static_range(PARTS):
            ask(experts + part * E * H, H, 0, H)
    start(EARLY)
    if tl.program_id(0) == 0:
        tl.store(counts + e, 0, mask=e < E)
    rows = x + tl.minimum(t, T - 1).to(tl.int64)[:, None] * H
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, H, DEPTH):
        c = k + tl.arange(0, DEPTH)[None, :]
        a = tl.load(rows + c, mask=c < H, other=0.0)
        whole = tl.zeros((COLUMNS, DEPTH), tl.float32)
        for part in tl.static_range(PARTS):
            b = tl.load(experts[:, None] + part * E * H + c, mask=c < H, other=0.0)
            if x.dtype.element_ty == tl.float32:
                whole += b.to(tl.float32)
            else:
                acc = _multiply(a, tl.trans(b), acc)
        if x.dtype.element_ty == tl.float32:
            acc = _multiply(a, tl.trans(whole), acc)
    tl.store(out + t.to(tl.int64)[:, None] * E + e[None, :], acc, mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit
def _keep(choice, s, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr):
    """choice [groups,experts of one] with -inf for groups that are out."""
    left, g = choice, tl.arange(0, choice.shape[0])
    best = tl.zeros((choice.shape[0],), tl.float32)
    for _ in tl.static_range(GROUP_BEST):
        top, at = tl.max(left, 1, return_indices=True, return_indices_tie_break_left=True)
        best += top
        left = tl.where(s == at[:, None], -float("inf"), left)
    best = tl.where(g < GROUPS, tl.where(best > LOWEST, best, LOWEST), -float("inf"))
    kept = tl.zeros((choice.shape[0],), tl.int32)
    for _ in tl.static_range(TOP_GROUPS):
        _, at = tl.max(best, 0, return_indices=True, return_indices_tie_break_left=True)
        kept = tl.where(g == at, 1, kept)
        best = tl.where(g == at, -float("inf"), best)
    return tl.where(kept[:, None] == 1, choice, -float("inf"))


@triton.jit(do_not_specialize=["T"])
def _route(
    logits, bias, weights, lists, counts, T, scale,
    SOFTMAX: tl.constexpr, BIAS: tl.constexpr, RENORMALISE: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    TOP_GROUPS: tl.constexpr, GROUP_BEST: tl.constexpr, K: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr,
    KP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """BIAS: 0 none, 1 of choice, 2 of logits."""
    start(EARLY)
    t = tl.program_id(0)
    g, s = tl.arange(0, GP)[:, None], tl.arange(0, SP)[None, :]
    real = (g < GROUPS) & (s < SIZE)
    z = tl.load(logits + t.to(tl.int64) * GROUPS * SIZE + g * SIZE + s, mask=real, other=-float("inf"))
    if BIAS == 2:
        z += tl.load(bias + g * SIZE + s, mask=real, other=0.0)
    if SOFTMAX:
        e = tl.exp(z - tl.max(tl.max(z, 1), 0))
        score = e / tl.sum(tl.sum(e, 1), 0)
    else:
        score = 1.0 / (1.0 + tl.exp(-z))
    choice = score
    if BIAS == 1:
        choice += tl.load(bias + g * SIZE + s, mask=real, other=0.0)
    choice = tl.where(choice > LOWEST, choice, LOWEST)  # of NaN too: an expert is chosen once, and is one of them
    choice = tl.where(real, choice, -float("inf"))
    if TOP_GROUPS < GROUPS:
        choice = _keep(choice, s, GROUPS, TOP_GROUPS, GROUP_BEST)
    left, scores = tl.reshape(choice, (GP * SP,)), tl.reshape(score, (GP * SP,))
    lane, place = tl.arange(0, GP * SP), tl.arange(0, KP)
    chosen, weight = tl.zeros((KP,), tl.int32), tl.zeros((KP,), tl.float32)
    for k in range(K):
        _, at = tl.max(left, 0, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.where(place == k, at, chosen)
        weight = tl.where(place == k, tl.sum(tl.where(lane == at, scores, 0.0)), weight)
        left = tl.where(lane == at, -float("inf"), left)
    if RENORMALISE:
        weight = weight / (tl.sum(weight) + 1e-20)
    tl.store(weights + t * K + place, weight * scale, mask=place < K)
    chosen = chosen // SP * SIZE + chosen % SP
    rank = tl.atomic_add(counts + chosen, 1, mask=place < K)
    tl.store(lists + chosen.to(tl.int64) * T + rank, t * K + place, mask=place < K)


@triton.jit(do_not_specialize=["T"])
def _experts(
    x, w, bias, out, lists, counts, T, E, N, K, EACH, alpha, limit,
    GATED: tl.constexpr, CLAMPED: tl.constexpr, BIAS: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [pairs/EACH,K], w [E,N,K], or if WIDE a descriptor of blocks of [E*N,K]. Of few rows the weight is the left
    operand, for the matrix units take 64 of it."""
    start(EARLY)
    FEW: tl.constexpr = ROWS < 64
    width = N // 2 if GATED else N
    tile, column = tl.program_id(0) // tl.cdiv(width, COLUMNS), tl.program_id(0) % tl.cdiv(width, COLUMNS)
    e = tl.arange(0, EP)
    count = tl.load(counts + e, mask=e < E, other=0)
    tiles = (count + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(tiles) <= tile).to(tl.int32))
    if expert < EP:
        first = (tile - tl.sum(tl.where(e < expert, tiles, 0))) * ROWS
        r = tl.arange(0, ROWS)
        mine = first + r < tl.sum(tl.where(e == expert, count, 0))
        pair = tl.load(lists + expert.to(tl.int64) * T + first + r, mask=mine, other=0)
        n = column * COLUMNS + tl.arange(0, COLUMNS)
        rows = x + (pair // EACH).to(tl.int64)[:, None] * K
        if not WIDE:
            left = w + (expert.to(tl.int64) * N + tl.minimum(n, width - 1))[:, None] * K
            right = left + width.to(tl.int64) * K if GATED else left
        if FEW:
            acc, up = tl.zeros((COLUMNS, ROWS), tl.float32), tl.zeros((COLUMNS, ROWS), tl.float32)
        else:
            acc, up = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, DEPTH):
            c = k + tl.arange(0, DEPTH)[None, :]
            a = tl.load(rows + c) if EVEN else tl.load(rows + c, mask=c < K, other=0.0)
            if WIDE:
                b = w.load([expert * N + column * COLUMNS, k])
            else:
                b = tl.load(left + c) if EVEN else tl.load(left + c, mask=c < K, other=0.0)
            acc = _multiply(b, tl.trans(a), acc) if FEW else _multiply(a, tl.trans(b), acc)
            if GATED:
                if WIDE:
                    d = w.load([expert * N + width + column * COLUMNS, k])
                else:
                    d = tl.load(right + c) if EVEN else tl.load(right + c, mask=c < K, other=0.0)
                up = _multiply(d, tl.trans(a), up) if FEW else _multiply(a, tl.trans(d), up)
        if BIAS:
            mine_bias = bias + expert.to(tl.int64) * N + tl.minimum(n, width - 1)
            b = tl.load(mine_bias).to(tl.float32)
            acc += b[:, None] if FEW else b[None, :]
            if GATED:
                d = tl.load(mine_bias + width).to(tl.float32)
                up += d[:, None] if FEW else d[None, :]
        if CLAMPED:
            acc = clamped(acc, up, alpha, limit)
        elif GATED:
            acc = silu(acc, up)
        if FEW:
            acc = tl.trans(acc)
        at = out + pair.to(tl.int64)[:, None] * width + n[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=mine[:, None] & (n < width)[None, :])


@triton.jit
def _sum(parts, weights, out, width, K: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(K):
        part = tl.load(parts + (row * K + k) * width + at, mask=at < width, other=0.0)
        total += part.to(tl.float32) * tl.load(weights + row * K + k)
    tl.store(out + row * width + at, total.to(out.dtype.element_ty), mask=at < width)


@dataclass(frozen=True)
class Routes:
    """weights float32 [T,top_k]. Pairs of expert e: the first counts[e] of lists[e], int32 [E] and [E,T]."""

    weights: torch.Tensor
    lists: torch.Tensor
    counts: torch.Tensor
    others: int = 0  # experts that are on other ranks

    def part(self, first: int, count: int) -> Routes:
        """To experts first to first + count - 1 alone, of these."""
        here = slice(first, first + count)
        return Routes(self.weights, self.lists[here], self.counts[here], len(self.counts) - count)

    @property
    def each(self) -> int:
        """Pairs that an expert has on average."""
        return int(-(-self.weights.numel() // (len(self.counts) + self.others)))


def route(x: torch.Tensor, router: Router, s: MoeSpec) -> Routes:
    """x [T,H], contiguous; every computation is float32."""
    (tokens, width), device, on = x.shape, x.device, early(x.device)
    counts = torch.empty(s.experts, dtype=torch.int32, device=device)
    lists = torch.empty(s.experts, tokens, dtype=torch.int32, device=device)
    logits = torch.empty(tokens, s.experts, dtype=torch.float32, device=device)
    weights = torch.empty(tokens, s.top_k, dtype=torch.float32, device=device)
    b = _cut("router", x, _blocks(ROUTER, x.dtype, tokens))
    _logits[(triton.cdiv(tokens, b.rows), triton.cdiv(s.experts, b.columns))](
        x, router.parts, logits, counts, tokens, s.experts, width, len(router.parts), b.rows, b.columns, b.depth,
        **on, num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    size = s.experts // s.groups
    _route[(tokens,)](
        logits, logits if router.bias is None else router.bias, weights, lists, counts, tokens, s.scale,
        s.scoring == "softmax", 0 if router.bias is None else 1 + (s.bias == "logits"), s.renormalise, s.groups, size,
        s.top_groups, s.group_best, s.top_k, *map(triton.next_power_of_2, (s.groups, size, s.top_k)), **on, num_warps=1,
    )  # fmt: skip
    return Routes(weights, lists, counts)


def product(
    x: torch.Tensor,
    w: torch.Tensor | Biased,
    r: Routes,
    gated: bool,
    blocks: Blocks | None = None,
    clamp: tuple[float, float] | None = None,
) -> torch.Tensor:
    """x [pairs,K], or [T,K] for the experts of a token alike, times w [E,N,K] of each pair's expert -> [pairs,N]; if
    gated [pairs,N/2]: silu of the first half of the sums times the second, or with `clamp` (alpha, limit) the gate of a
    MoeSpec with a limit. Summed in float32 and rounded once."""
    w, bias = w if isinstance(w, Biased) else (w, None)
    (experts, n, k), pairs = w.shape, r.weights.numel()
    b = blocks or chosen(x, w, r.each, gated)
    width = n // 2 if gated else n
    out = x.new_zeros(pairs, width) if r.others else x.new_empty(pairs, width)
    tiles, wide = min(pairs, pairs // b.rows + experts), b.wide and b.rows >= 64 and k * w.element_size() % 16 == 0
    weight = TensorDescriptor(w, [experts * n, k], [k, 1], [b.columns, b.depth]) if wide else w
    _experts[(tiles * triton.cdiv(width, b.columns),)](
        x, weight, w if bias is None else bias, out, r.lists, r.counts, r.lists.shape[1], experts, n, k,
        pairs // len(x), *(clamp or (0.0, 0.0)), gated, clamp is not None, bias is not None,
        triton.next_power_of_2(experts), b.rows, b.columns, b.depth, k % b.depth == 0, wide,
        **early(x.device), num_warps=b.warps, num_stages=b.stages,
    )  # fmt: skip
    return out


def moe(x: torch.Tensor, w: MoeWeights, s: MoeSpec, first: int | None = None) -> torch.Tensor:
    """Ops.moe: x [T,H], of a Router and weights [E,2F,H] and [E,H,F]. With `first`, what the experts from that id on
    add to it, float32; there are weights of no others."""
    x = x.contiguous()
    routes = routes_of(x, w, s, first)
    inner = product(x, w.gate_up, routes, True, clamp=clamp_of(s))
    return combined(product(inner, w.down, routes, False), routes, x.dtype if first is None else torch.float32)


def clamp_of(s: MoeSpec) -> tuple[float, float] | None:
    """alpha and limit"""
    return None if s.limit is None else (s.alpha, s.limit)


def routes_of(x: torch.Tensor, w: MoeWeights, s: MoeSpec, first: int | None) -> Routes:
    routes = route(x, w.router, s)
    return routes if first is None else routes.part(first, len(bare(w.down)))


def combined(parts: torch.Tensor, r: Routes, dtype: torch.dtype) -> torch.Tensor:
    """The weighted sum of a token's pairs: parts [pairs,H] -> [T,H]."""
    (tokens, top_k), width, block = r.weights.shape, parts.shape[1], 1024
    out = parts.new_empty(tokens, width, dtype=dtype)
    _sum[(tokens, triton.cdiv(width, block))](
        parts, r.weights, out, width, top_k, block, **early(parts.device), num_warps=4
    )
    return out


def key_of(rows: int, n: int, k: int, gated: bool) -> str:
    """Of a product's blocks in the GPU's file, by the rows that an expert has on average."""
    return f"{'gate_up' if gated else 'down'} {triton.next_power_of_2(rows)} x {n} x {k}"


def chosen(x: torch.Tensor, w: torch.Tensor, rows: int, gated: bool) -> Blocks:
    """The blocks that were fastest on this GPU; of a shape that was not tried there, its architecture's."""
    found = _tuned(x.device).get(key_of(rows, w.shape[1], w.shape[2], gated)) if x.dtype == torch.bfloat16 else None
    return found or planned(x, rows, gated)


def planned(x: torch.Tensor, rows: int, gated: bool) -> Blocks:
    """Those of the tables, but for what the architecture needs otherwise."""
    return _cut("gate_up" if gated else "down", x, usual(x.dtype, rows, gated))


def usual(dtype: torch.dtype, rows: int, gated: bool) -> Blocks:
    return _blocks(GATE_UP if gated else DOWN, dtype, rows)


def _cut(kernel: str, x: torch.Tensor, blocks: Blocks) -> Blocks:
    return cut(x.device, kernel, f"{x.element_size()} x {blocks.rows}", blocks)


@cache
def _tuned(device: torch.device) -> dict[str, Blocks]:
    path = TUNED / "experts" / name_of(device)
    products = json.loads(path.read_text())["products"] if path.exists() else {}
    return {key: Blocks(**blocks) for key, blocks in products.items()}


def _blocks(table: Table, dtype: torch.dtype, rows: int) -> Blocks:
    return next(blocks for most, blocks in table[dtype] if rows <= most)
