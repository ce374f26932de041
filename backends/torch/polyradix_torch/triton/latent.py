"""Latent attention (MLA) over a paged cache of rows [pages,page,1,R+rope], in two forms (DeepSeek-V2, 2405.04434).

Absorbed, for sequences of up to FEW new rows: `_prepare` takes queries through K of `up`, `_absorbed` reads each cached
row once, as key and as value, for many heads (split as in Flash-Decoding), `_join` joins the parts, and `_finish` takes
them through V. Expanded, for the others: one product makes keys and values of all heads, and attention is ordinary.
`up` is [H,nope+v,R] in the dtype of q.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from polyradix.backend.protocol import LatentSpec, LatentWeights
from polyradix_torch.triton import latent_prefix
from polyradix_torch.triton.attention import MOST_PARTS, MUCH, Paged, Plan, _add, _precision, _shared
from polyradix_torch.triton.cuts import cut
from polyradix_torch.triton.early import early, start
from polyradix_torch.triton.latent_prefix import dot as _dot
from polyradix_torch.triton.latent_prefix import padded as _padded
from polyradix_torch.triton.latent_prefix import unit as _unit
from polyradix_torch.triton.rows import turn

FEW = 64  # new rows of a sequence that are not expanded for
FEW_SHARED = 16  # as many are, where its first keys are shared
TOKENS = 2  # of them in one program
MOST_SPLITS = 32
ENOUGH = 512  # programs; more are not made by cutting the keys of short prefills into parts
ROOM = 1 << 28  # bytes of keys and values made at a time; heads take turns where it is too little
PLAN = ("positions", "slots", "tokens", "items", "cu_q", "kv_len", "page_start", "pages", "starts", "runs", "tiles",
        "common", "parts")  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Which rows of a batch take which form; int32 on the device. Expanded are the sequences of Paged.tiles."""

    tokens: torch.Tensor  # [A] rows that are absorbed: those of Paged.single, then those of `few`
    few: torch.Tensor  # [n,3] up to TOKENS rows: (sequence, first row in it, its place in `tokens` behind single's)
    runs: torch.Tensor  # [n,4] what is expanded: (sequence, first key, end, its place among all keys of runs)
    starts: torch.Tensor  # [S,3] first keys that are shared; what makes places of their positions; and of the others'
    keys: int = 0  # of all runs
    longest: int = 0  # of one


@triton.jit
def _row(
    q, c, norm, table, position, row, turned, eps, H, R: tl.constexpr, RP: tl.constexpr, NOPE: tl.constexpr,
    ROPE: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    """Row c, normed and rotated, goes to the cache's `row`; the rotated columns of row q to `turned`."""
    r, d = tl.arange(0, RP), tl.arange(0, HALF)[None, :]
    v = tl.load(c + r, mask=r < R, other=0.0).to(tl.float32)
    size = tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.sum(v * v) / R + eps))
    v = v * size * tl.load(norm + r, mask=r < R, other=0.0)
    angle = table + position.to(tl.int64) * ROPE + d
    cos = tl.load(angle, mask=d < ROPE // 2, other=0.0)
    sin = tl.load(angle + ROPE // 2, mask=d < ROPE // 2, other=0.0)
    tl.store(row + r, v.to(row.dtype.element_ty), mask=r < R)
    turn(c + R, row + R, cos, sin, 1, ROPE, ROPE, HALF, 1)
    turn(q + NOPE, turned, cos, sin, H, NOPE + ROPE, ROPE, HALF, HP)


@triton.jit
def _absorb(
    q, up, tokens, absorbed, tile, h, block, A, q_row, H, R: tl.constexpr, NOPE: tl.constexpr, NP: tl.constexpr,
    ROPE: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS absorbed rows of a head times WIDE columns of its K, which are read before it waits for q."""
    n, r = tl.arange(0, NP), block * WIDE + tl.arange(0, WIDE)
    inside = (n < NOPE)[:, None] & (r < R)[None, :]
    w = tl.load(up + (h * (NOPE + V) + n)[:, None] * R + r[None, :], mask=inside, other=0.0)
    start(EARLY)
    a = tile * ROWS + tl.arange(0, ROWS)
    token = tl.load(tokens + a, mask=a < A, other=0).to(tl.int64)
    inside = (a < A)[:, None] & (n < NOPE)[None, :]
    x = tl.load(q + (token * q_row + h * (NOPE + ROPE))[:, None] + n[None, :], mask=inside, other=0.0)
    acc = _dot(x, w, tl.zeros((ROWS, WIDE), tl.float32), PRECISION)
    at = absorbed + ((a.to(tl.int64) * H + h) * R)[:, None] + r[None, :]
    tl.store(at, acc.to(absorbed.dtype.element_ty), mask=(a < A)[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["T", "A"], do_not_specialize_on_alignment=PLAN)
def _prepare(
    q, c, norm, up, table, positions, slots, tokens, cache, turned, absorbed, T, A, q_row, c_row, eps, H,
    R: tl.constexpr, RP: tl.constexpr, NOPE: tl.constexpr, NP: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr,
    V: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """T programs take a row each, the others a tile of the product."""
    pid = tl.program_id(0)
    if pid < T:
        start(EARLY)
        t = pid.to(tl.int64)
        row = cache + tl.load(slots + t).to(tl.int64) * (R + ROPE)
        _row(
            q + t * q_row, c + t * c_row, norm, table, tl.load(positions + t), row, turned + t * H * ROPE, eps, H,
            R, RP, NOPE, ROPE, HALF, HP,
        )  # fmt: skip
    else:
        BLOCKS: tl.constexpr = (R + WIDE - 1) // WIDE
        part = pid - T
        _absorb(
            q, up, tokens, absorbed, part // (BLOCKS * H), part // BLOCKS % H, part % BLOCKS, A, q_row, H,
            R, NOPE, NP, ROPE, V, ROWS, WIDE, PRECISION, EARLY,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "slots"], do_not_specialize_on_alignment=PLAN)
def _absorbed(
    absorbed, turned, cache, part, lse, items, cu_q, kv_len, page_start, pages, common, scale, attn_scale, floor_scale,
    H, splits, slots, TOKENS: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, ROPE: tl.constexpr,
    OP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One part of the keys of an item, for HEADS heads of its rows. Queries are columns: the matrix units take 64 keys
    or latent columns as their rows, however few queries there are. More slots than splits are for parts of shared keys,
    which this leaves out."""
    start(EARLY)
    item, split = tl.program_id(0), tl.program_id(2)
    first, place = 0, item
    if TOKENS == 1:
        s = tl.load(items + item)
    else:
        s = tl.load(items + 3 * item)
        first, place = tl.load(items + 3 * item + 1), tl.load(items + 3 * item + 2)
    j = tl.arange(0, TOKENS * HEADS)
    i, h = j // HEADS, tl.program_id(1) * HEADS + j % HEADS
    q0, n = tl.load(cu_q + s), tl.load(kv_len + s)
    count = tl.load(cu_q + s + 1) - q0
    old = n - count + first  # keys before the first row
    position = old + i
    mine = (first + i < count) & (h < H)
    r, d = tl.arange(0, RP), tl.arange(0, OP)
    query = (place + i).to(tl.int64) * H + h
    to = query * slots + split
    keys, low = tl.minimum(old + TOKENS, n), 0
    if SHARED:
        low = tl.load(common + item)
    share = tl.cdiv(tl.cdiv(keys - low, splits), BLOCK) * BLOCK
    begin = low + split * share
    end = tl.minimum(begin + share, keys)
    if begin >= end:
        tl.store(lse + to, -float("inf"), mask=mine)
        return
    inside = mine[:, None] & (r < R)[None, :]
    q = tl.load(absorbed + query[:, None] * R + r[None, :], mask=inside, other=0.0)
    inside = mine[:, None] & (d < ROPE)[None, :]
    token = (q0 + first + i).to(tl.int64) * H + h
    q_rope = tl.load(turned + token[:, None] * ROPE + d[None, :], mask=inside, other=0.0)
    unit = _unit(scale, attn_scale, floor_scale, position)
    own = pages + tl.load(page_start + s)
    top = tl.full((TOKENS * HEADS,), -1e30, tl.float32)
    total = tl.zeros((TOKENS * HEADS,), tl.float32)
    acc = tl.zeros((RP, TOKENS * HEADS), tl.float32)
    for block in range(begin, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        known = at < end
        page = tl.load(own + at // PAGE, mask=known, other=0).to(tl.int64)
        row = cache + ((page * PAGE + at % PAGE) * (R + ROPE))[:, None]
        c = tl.load(row + r[None, :], mask=known[:, None] & (r < R)[None, :], other=0.0)
        k = tl.load(row + R + d[None, :], mask=known[:, None] & (d < ROPE)[None, :], other=0.0)
        score = _dot(c, tl.trans(q), tl.zeros((BLOCK, TOKENS * HEADS), tl.float32), PRECISION)
        score = _dot(k, tl.trans(q_rope), score, PRECISION) * unit[None, :]
        seen = known[:, None] & (at[:, None] <= position[None, :])
        score = tl.where(seen, score, -float("inf"))
        new = tl.maximum(top, tl.max(score, 0))
        fix = tl.exp2(top - new)
        p = tl.exp2(score - new[None, :])
        total = total * fix + tl.sum(p, 0)
        acc = _dot(tl.trans(c), p.to(c.dtype), acc * fix[None, :], PRECISION)
        top = new
    some = tl.maximum(total, 1e-30)
    inside = (r < R)[:, None] & mine[None, :]
    tl.store(part + to[None, :] * R + r[:, None], (acc / some[None, :]).to(part.dtype.element_ty), mask=inside)
    tl.store(lse + to, tl.where(total > 0, top + tl.log2(some), -float("inf")), mask=mine)


@triton.jit(do_not_specialize=["splits", "slots"], do_not_specialize_on_alignment=PLAN)
def _join(
    part, lse, mean, parts, H, splits, slots, R: tl.constexpr, WIDE: tl.constexpr, MOST: tl.constexpr,
    SHARED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """WIDE columns of the parts of one head of one row, weighed; parts without keys hold anything."""
    start(EARLY)
    place, s, count = tl.program_id(0).to(tl.int64), tl.arange(0, MOST), splits
    if SHARED:
        count += tl.load(parts + place // H)
    r = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    logs = tl.load(lse + place * slots + s, mask=s < count, other=-float("inf"))
    weight = tl.exp2(logs - tl.max(logs, 0))
    inside = (weight > 0)[:, None] & (r < R)[None, :]
    x = tl.load(part + (place * slots + s)[:, None] * R + r[None, :], mask=inside, other=0.0)
    result = tl.sum(x * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(mean + place * R + r, result.to(mean.dtype.element_ty), mask=r < R)


@triton.jit(do_not_specialize=["A"], do_not_specialize_on_alignment=PLAN)
def _finish(
    mean, up, out, tokens, A, H, R: tl.constexpr, NOPE: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a head, times WIDE rows of its V."""
    start(EARLY)
    a, h = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    v = tl.program_id(2) * WIDE + tl.arange(0, WIDE)
    row = mean + ((a.to(tl.int64) * H + h) * R)[:, None]
    weight = up + ((h * (NOPE + V) + NOPE + v) * R)[:, None]
    acc = tl.zeros((ROWS, WIDE), tl.float32)
    for k in range(0, R, CHUNK):
        r = (k + tl.arange(0, CHUNK))[None, :]
        x = tl.load(row + r, mask=(a < A)[:, None] & (r < R), other=0.0)
        w = tl.load(weight + r, mask=(v < V)[:, None] & (r < R), other=0.0)
        acc = _dot(x, tl.trans(w), acc, PRECISION)
    token = tl.load(tokens + a, mask=a < A, other=0).to(tl.int64)
    to = out + ((token * H + h) * V)[:, None] + v[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=(a < A)[:, None] & (v < V)[None, :])


@triton.jit(do_not_specialize_on_alignment=PLAN)
def _gather(
    cache, rows, runs, page_start, pages, WIDTH, PADDED: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK keys of one run, out of the pages."""
    run = runs + 4 * tl.program_id(0)
    s, begin = tl.load(run), tl.load(run + 1)
    at, d = begin + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, PADDED)
    known = at < tl.load(run + 2)
    page = tl.load(pages + tl.load(page_start + s) + at // PAGE, mask=known, other=0).to(tl.int64)
    inside = known[:, None] & (d < WIDTH)[None, :]
    x = tl.load(cache + ((page * PAGE + at % PAGE) * WIDTH)[:, None] + d[None, :], mask=inside)
    tl.store(rows + ((tl.load(run + 3) - begin + at).to(tl.int64) * WIDTH)[:, None] + d[None, :], x, mask=inside)


@triton.jit(do_not_specialize_on_alignment=PLAN)
def _expanded(
    q, turned, k, v, k_rope, made, rows, out, cu_q, kv_len, starts, tiles, scale, attn_scale, floor_scale, q_row, H,
    head, G, R: tl.constexpr, NOPE: tl.constexpr, NP: tl.constexpr, ROPE: tl.constexpr, OP: tl.constexpr,
    V: tl.constexpr, VP: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, DENSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """TILE rows of one sequence, one of the G heads from `head` on. made [keys,G,nope+v], rows [keys,R+rope]; k, v and
    k_rope are descriptors of blocks of them."""
    tile, g = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(0)  # the longest first
    s, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    q0, n, common = tl.load(cu_q + s), tl.load(kv_len + s), tl.load(starts + 3 * s)
    shared, own = tl.load(starts + 3 * s + 1), tl.load(starts + 3 * s + 2)
    count = tl.load(cu_q + s + 1) - q0
    i = first + tl.arange(0, TILE)
    m, d, e = tl.arange(0, NP), tl.arange(0, OP), tl.arange(0, VP)
    token, h = (q0 + i).to(tl.int64), head + g
    inside = (i < count)[:, None] & (m < NOPE)[None, :]
    query = tl.load(q + (token * q_row + h * (NOPE + ROPE))[:, None] + m[None, :], mask=inside, other=0.0)
    inside = (i < count)[:, None] & (d < ROPE)[None, :]
    q_rope = tl.load(turned + ((token * H + h) * ROPE)[:, None] + d[None, :], mask=inside, other=0.0)
    position = n - count + i
    unit = _unit(scale, attn_scale, floor_scale, position)
    top = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, VP), tl.float32)
    low = n - count + first
    whole = 0
    if DENSE:
        whole = (low + 1) // BLOCK * BLOCK  # keys before it are seen by every row
        for begin in range(0, whole, BLOCK):
            key = begin + tl.where(begin < common, shared, own)
            score = _dot(query, tl.trans(k.load([key, g * (NOPE + V)])), tl.zeros((TILE, BLOCK), tl.float32), PRECISION)
            score = _dot(q_rope, tl.trans(k_rope.load([key, R])), score, PRECISION) * unit[:, None]
            acc, total, top = _add(acc, total, top, score, 1.0, v.load([key, g * (NOPE + V) + NOPE]), PRECISION)
    for block in range(whole, tl.minimum(low + TILE, n), BLOCK):
        at = block + tl.arange(0, BLOCK)
        known, place = (at < n)[:, None], (at + tl.where(at < common, shared, own)).to(tl.int64)[:, None]
        row = made + (place * G + g) * (NOPE + V)
        keys = tl.load(row + m[None, :], mask=known & (m < NOPE)[None, :], other=0.0)
        ropes = tl.load(rows + place * (R + ROPE) + R + d[None, :], mask=known & (d < ROPE)[None, :], other=0.0)
        values = tl.load(row + NOPE + e[None, :], mask=known & (e < V)[None, :], other=0.0)
        score = _dot(query, tl.trans(keys), tl.zeros((TILE, BLOCK), tl.float32), PRECISION)
        score = _dot(q_rope, tl.trans(ropes), score, PRECISION) * unit[:, None]
        score = tl.where(at[None, :] <= position[:, None], score, -float("inf"))
        acc, total, top = _add(acc, total, top, score, 1.0, values, PRECISION)
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + ((token * H + h) * V)[:, None] + e[None, :], result, mask=(i < count)[:, None] & (e < V)[None, :])


# By bytes of a number: query rows and warps of an expanded tile, and its keys on chips with little and MUCH memory.
PREFILL = {2: (128, 8, 32, 64), 4: (16, 8, 16, 16)}


def tile_rows(bytes_each: int) -> int:
    """Query rows of one expanded tile."""
    return PREFILL[bytes_each][0]


def prefill_plan(q: torch.Tensor) -> Plan:
    rows, warps, *keys = PREFILL[q.element_size()]
    much = _shared(q.device) >= MUCH
    return Plan(keys[much], warps, 2, rows, much and q.element_size() == 2)


ABSORB = {2: (64, 128, 4), 4: (16, 16, 8)}  # by bytes of a number: rows, columns and warps of a tile of that product
# Likewise, queries (rows times heads) of a program that absorbs, and by how many those are, its keys.
COLUMNS = {2: 32, 4: 16}
DECODE = {(2, 16): Plan(32, 4, 5), (2, 32): Plan(32, 8, 3), (4, 16): Plan(16, 8, 1)}


def attend(
    q: torch.Tensor, c: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, at: Paged,
    x: Rows, w: LatentWeights, a: LatentSpec,
) -> torch.Tensor:  # fmt: skip
    """Ops.attend_latent for q [T,H*(nope+rope)] and c [T,R+rope], whose columns are contiguous: [T,H*v]."""
    heads, count, splits = len(w.up), len(x.tokens), min(at.splits, MOST_SPLITS)
    turned = q.new_empty(len(q), heads, a.rope)
    absorbed, out = q.new_empty(count, heads, a.rank), q.new_empty(len(q), heads * a.v)
    rows, wide, warps = ABSORB[q.element_size()]
    rows, wide = min(rows, _padded(count)), min(wide, _padded(a.rank))
    _prepare[(len(q) + triton.cdiv(count, rows) * heads * triton.cdiv(a.rank, wide),)](
        q, c, w.norm, w.up, w.table, positions, slots, x.tokens, cache, turned, absorbed, len(q), count, q.stride(0),
        c.stride(0), a.eps, heads, a.rank, triton.next_power_of_2(a.rank), a.nope, _padded(a.nope), a.rope,
        triton.next_power_of_2(a.rope // 2), a.v, triton.next_power_of_2(heads), rows, wide, _precision(q),
        **early(q.device), num_warps=warps,
    )  # fmt: skip
    if count:
        mean, singles = torch.empty_like(absorbed), len(at.single)
        if singles:
            _mean(absorbed[:singles], turned, cache, mean[:singles], at.single, 1, splits, at, a)
        if len(x.few):
            enough = max(1, min(splits, ENOUGH // len(x.few)))
            _mean(absorbed[singles:], turned, cache, mean[singles:], x.few, TOKENS, enough, at, a)
        chunk = min(256 // q.element_size(), _padded(a.rank))
        wide = 32 if count <= 16 else 64
        _finish[(triton.cdiv(count, 16), heads, triton.cdiv(a.v, wide))](
            mean, w.up, out, x.tokens, count, heads, a.rank, a.nope, a.v, 16, wide, chunk, _precision(q),
            **early(q.device), num_warps=4, num_stages=4,
        )  # fmt: skip
    if len(at.tiles):
        _expand(q, turned, cache, out, at, x, w.up, a, prefill_plan(q))
    return out


def _mean(
    absorbed: torch.Tensor, turned: torch.Tensor, cache: torch.Tensor, mean: torch.Tensor, items: torch.Tensor,
    tokens: int, splits: int, at: Paged, a: LatentSpec,
) -> None:  # fmt: skip
    """Into mean [n,H,R], of absorbed [n,H,R], whose items are `single` or `few`."""
    (count, heads, rank), size, device = absorbed.shape, absorbed.element_size(), absorbed.device
    shared = at.shared if tokens == 1 else None
    slots = splits if shared is None else splits + MOST_PARTS
    part, lse = mean, torch.empty(count, heads, slots, dtype=torch.float32, device=device)
    if slots > 1:
        part = torch.empty(count, heads, slots, rank, dtype=torch.float32, device=device)
    common, parts = (items, items) if shared is None else (shared.common, shared.parts)
    if shared is not None:
        latent_prefix.launch(absorbed, turned, cache, part, lse, splits, at, a)
    columns = max(16, min(COLUMNS[size], tokens * triton.next_power_of_2(heads)))
    together, plan = columns // tokens, cut(device, "absorbed", f"{size} x {columns}", DECODE[size, columns])
    _absorbed[(len(items), triton.cdiv(heads, together), splits)](
        absorbed, turned, cache, part, lse, items, at.cu_q, at.kv_len, at.page_start, at.pages, common, a.scale,
        a.attn_scale, a.floor_scale, heads, splits, slots, tokens, together, rank, _padded(rank), a.rope,
        _padded(a.rope), cache.shape[1], plan.keys, shared is not None, _precision(absorbed), **early(device),
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if slots > 1:
        chunk = min(256 // size if count * heads < 1024 else 1024 // size, _padded(rank))
        _join[(count * heads, triton.cdiv(rank, chunk))](
            part, lse, mean, parts, heads, splits, slots, rank, chunk, triton.next_power_of_2(slots),
            shared is not None, **early(device), num_warps=2 if chunk * size <= 256 else 8,
        )  # fmt: skip


def _expand(
    q: torch.Tensor, turned: torch.Tensor, cache: torch.Tensor, out: torch.Tensor, at: Paged, x: Rows, up: torch.Tensor,
    a: LatentSpec, plan: Plan,
) -> None:  # fmt: skip
    heads, page, width, block = len(up), cache.shape[1], a.rank + a.rope, 16
    rows = q.new_empty(x.keys, width)
    _gather[(len(x.runs), triton.cdiv(x.longest, block))](
        cache, rows, x.runs, at.page_start, at.pages, width, triton.next_power_of_2(width), page, block, num_warps=4
    )
    together = max(1, min(heads, ROOM // (x.keys * (a.nope + a.v) * q.element_size())))
    for head in range(0, heads, together):
        made = F.linear(rows[:, : a.rank], up[head : head + together].flatten(0, 1))
        blocks: list[Any] = [None] * 3
        if plan.dense and all(n == _padded(n) for n in (a.nope, a.v, a.rope)) and width % 8 == 0:
            sizes = (made, a.nope), (made, a.v), (rows, a.rope)
            blocks = [TensorDescriptor(y, list(y.shape), [y.shape[1], 1], [plan.keys, n]) for y, n in sizes]
        _expanded[(made.shape[1] // (a.nope + a.v), len(at.tiles))](
            q, turned, *blocks, made, rows, out, at.cu_q, at.kv_len, x.starts, at.tiles, a.scale, a.attn_scale,
            a.floor_scale, q.stride(0), heads, head, made.shape[1] // (a.nope + a.v), a.rank, a.nope, _padded(a.nope),
            a.rope, _padded(a.rope), a.v, _padded(a.v), plan.rows, plan.keys, None not in blocks, _precision(q),
            num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
