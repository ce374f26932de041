"""Paged attention: split decode (Flash-Decoding, Dao et al., 2023), ragged prefill (FlashAttention-2, Dao, 2023), and
first keys that many sequences share, read once for all of them (Hydragen, Juravsky et al., 2024).

The cache is [pages, page, Hk, D]. A sequence's pages are a run of one flat list: pages[page_start[s] + i].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from polyradix.backend.protocol import AttnSpec
from polyradix_torch.triton.cuts import cut
from polyradix_torch.triton.early import early, start
from polyradix_torch.triton.eight import readable, wide

LOG2E = tl.constexpr(1.4426950408889634)
PLAN = ("single", "cu_q", "kv_len", "page_start", "pages", "tiles", "common", "parts", "members", "items")
ROWS = 16  # the least rows of a matrix product; a kv head's query heads are padded up to it
MEMBERS = 16  # sequences that read shared keys together
UNIT = 64  # shared keys are a multiple of it
MOST_PARTS = 8  # that shared keys are cut into


@dataclass(frozen=True)
class Shared:
    """First keys that several sequences share; int32 on the device. Sequences are counted as `single` has them.

    An item is up to MEMBERS sequences over a part of their keys: (first in `members`, how many, first key, end, part).
    """

    common: torch.Tensor  # [n] shared keys of each sequence; 0 for none
    parts: torch.Tensor  # [n] that they are cut into
    members: torch.Tensor  # [n] sequences, those of a group together
    items: torch.Tensor  # [I,5]; of zeros when unused


@dataclass(frozen=True)
class Paged:
    """Where each sequence's keys are, and its query rows; int32 on the device. Sequences with one row are in `single`,
    their keys that are not `shared` cut into `splits` parts; the others are in `tiles` [n,2] of (sequence, first query
    row in it)."""

    cu_q: torch.Tensor  # [S+1]
    kv_len: torch.Tensor  # [S]
    page_start: torch.Tensor  # [S]
    pages: torch.Tensor
    single: torch.Tensor
    splits: int
    tiles: torch.Tensor
    shared: Shared | None = None


@triton.jit
def _scores(q, k, scale, cap, CAP: tl.constexpr, PRECISION: tl.constexpr):
    """Times _unit they are in units of log2."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if CAP:
        s = cap * _tanh(s * (scale / cap))
    return s


@triton.jit
def _tanh(x):
    """Near zero, where the exponential's digits cancel, by Lambert's continued fraction, to 5 terms."""
    y = x * x
    near = x * (945.0 + y * (105.0 + y)) / (945.0 + y * (420.0 + y * 15.0))
    return tl.where(y < 0.5, near, 2.0 / (1.0 + tl.exp2(x * (-2.0 * LOG2E))) - 1.0)


@triton.jit
def _unit(scale, CAP: tl.constexpr):
    return LOG2E if CAP else scale * LOG2E


@triton.jit
def _read(
    keys, values, mine, at, known, h, HK, to: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Keys and values [BLOCK,DP] of head h at positions `at` in dtype `to`, zeros where not `known`."""
    d = tl.arange(0, DP)
    page = tl.load(mine + at // PAGE, mask=known, other=0).to(tl.int64)
    row = ((page * PAGE + at % PAGE) * HK + h) * D
    inside = known[:, None] & (d < D)[None, :]
    k = tl.load(keys + row[:, None] + d[None, :], mask=inside, other=0.0)
    v = tl.load(values + row[:, None] + d[None, :], mask=inside, other=0.0)
    return wide(k, to), wide(v, to)


@triton.jit
def _add(acc, total, top, score, unit, v, PRECISION: tl.constexpr):
    """One block of keys added to the running sums, maximum included."""
    new = tl.maximum(top, tl.max(score, 1) * unit)
    fix = tl.exp2(top - new)
    p = tl.exp2(score * unit - new[:, None])
    total = total * fix + tl.sum(p, 1)
    return acc * fix[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION), total, new


@triton.jit
def _begin(sinks, heads, inside, ROWS: tl.constexpr, SINK: tl.constexpr):
    """Greatest scores, in units of log2, and sums of rows that have seen no key but, if there is one, their sink."""
    if SINK:
        top = tl.load(sinks + heads, mask=inside, other=0.0) * LOG2E
        return top, tl.zeros((ROWS,), tl.float32) + 1.0
    return tl.full((ROWS,), -1e30, tl.float32), tl.zeros((ROWS,), tl.float32)


@triton.jit(do_not_specialize_on_alignment=PLAN)
def _decode(
    q, keys, values, sinks, out, part, lse, single, cu_q, kv_len, page_start, pages, common, scale, cap, window, q_row,
    HK, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, SLOTS: tl.constexpr, CAP: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """A row's parts go to the first SPLITS of its SLOTS places; more places are for parts of shared keys. A sink is in
    the first part."""
    start(EARLY)
    i, h, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    s = tl.load(single + i)
    token = tl.load(cu_q + s).to(tl.int64)
    n = tl.load(kv_len + s)
    first = tl.maximum(n - window, 0)
    if SLOTS > SPLITS:
        first = tl.load(common + i)
    share = tl.cdiv(tl.cdiv(n - first, SPLITS), 16) * 16
    begin = first + split * share
    end = tl.minimum(begin + share, n)
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    rows = (g < G)[:, None] & (d < D)[None, :]
    query = tl.load(q + token * q_row + (h * G + g)[:, None] * D + d[None, :], mask=rows, other=0.0)
    mine = pages + tl.load(page_start + s)
    unit = _unit(scale, CAP)
    top, total = _begin(sinks, h * G + g, g < G, GP, SINK)
    if SINK:
        top, total = tl.where(split == 0, top, -1e30), tl.where(split == 0, total, 0.0)
    acc = tl.zeros((GP, DP), tl.float32)
    for block in range(begin, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        k, v = _read(keys, values, mine, at, at < end, h, HK, query.dtype, D, DP, PAGE)
        score = tl.where((at < end)[None, :], _scores(query, k, scale, cap, CAP, PRECISION), -float("inf"))
        acc, total, top = _add(acc, total, top, score, unit, v, PRECISION)
    if SLOTS == 1:
        result = acc / total[:, None]
        head = token * HK * G + h * G
        tl.store(out + (head + g)[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=rows)
    else:
        place = ((i * HK + h) * G + g) * SLOTS + split
        _put(part, lse, place, acc, total, top, g < G, D, DP)


@triton.jit
def _put(part, lse, place, acc, total, top, rows, D: tl.constexpr, DP: tl.constexpr):
    """Rows of one part, as averages and the logarithms of their weights; of no keys, minus infinity."""
    d = tl.arange(0, DP)
    some = tl.maximum(total, 1e-30)
    tl.store(part + place[:, None] * D + d[None, :], acc / some[:, None], mask=rows[:, None] & (d < D)[None, :])
    tl.store(lse + place, tl.where(total > 0, top + tl.log2(some), -float("inf")), mask=rows)


@triton.jit(do_not_specialize_on_alignment=PLAN)
def _merge(
    part, lse, out, single, cu_q, parts, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr,
    PADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The parts of one query head of one row, weighed."""
    start(EARLY)
    row, heads, h = tl.program_id(0).to(tl.int64), tl.num_programs(1), tl.program_id(1)
    token = tl.load(cu_q + tl.load(single + row)).to(tl.int64)
    count = SPLITS
    if SLOTS > SPLITS:
        count += tl.load(parts + row)
    i, d = tl.arange(0, PADDED), tl.arange(0, DP)
    place = (row * heads + h) * SLOTS + i
    logs = tl.load(lse + place, mask=i < count, other=-float("inf"))
    weight = tl.exp2(logs - tl.max(logs, 0))
    inside = (i < count)[:, None] & (d < D)[None, :]
    x = tl.load(part + place[:, None] * D + d[None, :], mask=inside, other=0.0)
    result = tl.sum(x * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (token * heads + h) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def _precision(x: torch.Tensor) -> str | None:
    """Of products of x; that of narrow floats is nowhere in doubt, and not every chip knows "tf32"."""
    return "ieee" if x.dtype == torch.float32 else None


def _sinks(q: torch.Tensor, a: AttnSpec) -> torch.Tensor:
    """Any tensor if there are none."""
    return q if a.sinks is None else a.sinks


KV = tuple[torch.Tensor, torch.Tensor]


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: KV, at: Paged, a: AttnSpec) -> torch.Tensor:
    """Each sequence's query rows, its newest tokens, over its keys: q [T,Hq,D] -> [T,Hq*D].

    k and v [T,Hk,D], whose heads are contiguous, are in the cache already, and of the values that it holds."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    kv = readable(kv[0]), readable(kv[1])
    if len(at.single):
        launch_decode(q, kv, out, at, a, decode_plan(q, at.splits, _eight(kv)))
    if len(at.tiles):
        launch_prefill(q, k, v, kv, out, at, a, prefill_plan(q, _eight(kv)))
    return out.flatten(1)


@dataclass(frozen=True)
class Plan:
    """How a kernel is cut and compiled."""

    keys: int  # in a block
    warps: int
    stages: int = 3
    rows: int = 0  # of a tile of prefill or of shared keys
    dense: bool = False  # keys of this batch are read from k and v, by tensor descriptors


def decode_plan(q: torch.Tensor, splits: int, eight: bool = False) -> Plan:
    """`eight`: of a cache of float8."""
    if int(triton.next_power_of_2(q.shape[2])) * q.element_size() > 256:
        return _cut("decode", q, eight, Plan(64 // q.element_size(), 4))
    return _cut("decode", q, eight, Plan(32, 2) if splits == 1 else Plan(64, 4))


def _eight(kv: KV) -> bool:
    return bool(kv[0].element_size() == 1)


def _bytes(q: torch.Tensor, eight: bool) -> int:
    """The first key of PREFILL."""
    return 1 if eight and q.element_size() == 2 else q.element_size()


def _cut(kernel: str, q: torch.Tensor, eight: bool, plan: Plan) -> Plan:
    plan = cut(q.device, kernel, f"{_bytes(q, eight)} x {_padded(q.shape[2])}", plan)
    return replace(plan, stages=1) if eight and q.element_size() == 4 else plan  # more stages spill


def launch_decode(
    q: torch.Tensor, kv: KV, out: torch.Tensor, at: Paged, a: AttnSpec, plan: Plan, tile: Plan | None = None
) -> None:
    """`tile` is of the shared keys. Layers with a window read all keys as if none were shared."""
    count, (_, heads, dim), splits = len(at.single), q.shape, at.splits
    page, kv_heads = kv[0].shape[1:3]
    group, wide = heads // kv_heads, _columns(dim)
    shared = at.shared if a.window is None else None
    slots = splits if shared is None else splits + MOST_PARTS
    part, lse, common, parts = out, out, at.single, at.single
    if slots > 1:
        part = torch.empty(count, heads, slots, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(count, heads, slots, dtype=torch.float32, device=q.device)
    if shared is not None:
        common, parts = shared.common, shared.parts
        _launch_prefix(q, kv, part, lse, at, shared, a, tile or prefill_plan(q, _eight(kv)))
    _decode[(count, kv_heads, splits)](
        q, *kv, _sinks(q, a), out, part, lse, at.single, at.cu_q, at.kv_len, at.page_start, at.pages, common, a.scale,
        a.softcap or 0.0, a.window or 1 << 30, q.stride(0), kv_heads, group, max(ROWS, triton.next_power_of_2(group)),
        dim, wide, page, plan.keys, splits, slots, a.softcap is not None, a.sinks is not None, _precision(q),
        **early(q.device), num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    if slots > 1:
        _merge[(count, heads)](
            part, lse, out, at.single, at.cu_q, parts, dim, wide, splits, slots, triton.next_power_of_2(slots),
            **early(q.device), num_warps=2,
        )  # fmt: skip


@triton.jit
def _blocks(
    acc, total, top, query, keys, values, mine, scale, cap, window, begin, end, position, h, HK, least, n,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys at positions begin to end, out of the pages; MASKED where not every row sees them all, and none those before
    `least`, which may be NaN."""
    unit = _unit(scale, CAP)
    for block in range(begin, end, BLOCK):
        at = block + tl.arange(0, BLOCK)
        known = at < n
        if MASKED:
            known &= at >= least
        k, v = _read(keys, values, mine, at, known, h, HK, query.dtype, D, DP, PAGE)
        score = _scores(query, k, scale, cap, CAP, PRECISION)
        if MASKED:
            seen = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window)
            score = tl.where(seen, score, -float("inf"))
        acc, total, top = _add(acc, total, top, score, unit, v, PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize_on_alignment=PLAN)
def _prefix(
    q, keys, values, part, lse, single, cu_q, page_start, pages, members, items, scale, cap, q_row, HK, SPLITS,
    G: tl.constexpr, PACK: tl.constexpr, MEMBERS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, SLOTS: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One item: a tile's rows are PACK query heads of one kv head of each sequence. All see all of its keys."""
    start(EARLY)
    item = items + 5 * tl.program_id(0)
    count = tl.load(item + 1)
    if count == 0:
        return
    mine, begin, end = members + tl.load(item), tl.load(item + 2), tl.load(item + 3)
    PARTS: tl.constexpr = (G + PACK - 1) // PACK
    r, d = tl.arange(0, MEMBERS * PACK), tl.arange(0, DP)
    h, g = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS * PACK + r % PACK
    rows = (r // PACK < count) & (g < G)
    row = tl.load(mine + r // PACK, mask=rows, other=0).to(tl.int64)
    token = tl.load(cu_q + tl.load(single + row)).to(tl.int64)
    inside = rows[:, None] & (d < D)[None, :]
    query = tl.load(q + (token * q_row + (h * G + g) * D)[:, None] + d[None, :], mask=inside, other=0.0)
    top = tl.full((MEMBERS * PACK,), -1e30, tl.float32)
    total = tl.zeros((MEMBERS * PACK,), tl.float32)
    acc = tl.zeros((MEMBERS * PACK, DP), tl.float32)
    acc, total, top = _blocks(
        acc, total, top, query, keys, values, pages + tl.load(page_start + tl.load(single + tl.load(mine))), scale,
        cap, 0, begin, end, r, h, HK, 0, end, D, DP, PAGE, BLOCK, False, CAP, PRECISION,
    )  # fmt: skip
    _put(part, lse, ((row * HK + h) * G + g) * SLOTS + SPLITS + tl.load(item + 4), acc, total, top, rows, D, DP)


def _launch_prefix(
    q: torch.Tensor, kv: KV, part: torch.Tensor, lse: torch.Tensor, at: Paged, x: Shared, a: AttnSpec, plan: Plan
) -> None:
    _, heads, slots, dim = part.shape
    page, kv_heads = kv[0].shape[1:3]
    group = heads // kv_heads
    pack = min(triton.next_power_of_2(group), max(1, plan.rows // MEMBERS))
    _prefix[(len(x.items), kv_heads * triton.cdiv(group, pack))](
        q, *kv, part, lse, at.single, at.cu_q, at.page_start, at.pages, x.members, x.items, a.scale, a.softcap or 0.0,
        q.stride(0), kv_heads, at.splits, group, pack, MEMBERS, dim, _columns(dim), page,
        min(plan.keys, UNIT), slots, a.softcap is not None, _precision(q), **early(q.device), num_warps=plan.warps,
        num_stages=plan.stages,
    )  # fmt: skip


@triton.jit
def _dense(
    acc, total, top, query, k, v, scale, cap, begin, end, column, BLOCK: tl.constexpr, CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys in rows begin to end of the batch, whole blocks that every row sees."""
    unit = _unit(scale, CAP)
    for row in range(begin, end, BLOCK):
        score = _scores(query, k.load([row, column]), scale, cap, CAP, PRECISION)
        acc, total, top = _add(acc, total, top, score, unit, v.load([row, column]), PRECISION)
    return acc, total, top


@triton.jit(do_not_specialize_on_alignment=PLAN)
def _prefill(
    q, k, v, keys, values, sinks, out, cu_q, kv_len, page_start, pages, tiles, scale, cap, window, q_row, HQ, HK,
    G: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    CUT: tl.constexpr, BLOCK: tl.constexpr, DENSE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    SINK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's rows are TILE // PACK tokens of PACK query heads of one kv head. Those in `tiles` are CUT as tall."""
    TOKENS: tl.constexpr = TILE // PACK
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the longest first
    h, part = tl.program_id(0) // G, tl.program_id(0) % G
    s, first = tl.load(tiles + tile // CUT * 2), tl.load(tiles + tile // CUT * 2 + 1)
    first += tile % CUT * TILE + part % PACK * TOKENS
    q0 = tl.load(cu_q + s)
    count, n = tl.load(cu_q + s + 1) - q0, tl.load(kv_len + s)
    if first >= count:
        return
    r, d = tl.arange(0, TILE), tl.arange(0, DP)
    i, head = first + r // PACK, h * G + part // PACK * PACK + r % PACK
    position = n - count + i
    rows = (i < count)[:, None] & (d < D)[None, :]
    token = (q0 + i).to(tl.int64)
    query = tl.load(q + (token * q_row + head * D)[:, None] + d[None, :], mask=rows, other=0.0)
    mine = pages + tl.load(page_start + s)
    top, total = _begin(sinks, head, i < count, TILE, SINK)
    acc = tl.zeros((TILE, DP), tl.float32)
    low = n - count + first  # the first row's position
    end = tl.minimum(low + TOKENS, n)
    whole = (low + 1) // BLOCK * BLOCK  # blocks before it are seen by every row, but for the window
    least, inner = 0, 0
    if WINDOW:
        least = tl.maximum(low - window + 1, 0)
        begin = least // BLOCK * BLOCK
        whole = tl.maximum(whole, begin)
        inner = tl.minimum(tl.maximum(tl.cdiv(low + TOKENS - window, BLOCK) * BLOCK, begin), whole)
        acc, total, top = _blocks(
            acc, total, top, query, keys, values, mine, scale, cap, window, begin, inner, position, h, HK, least, n,
            D, DP, PAGE, BLOCK, True, CAP, PRECISION,
        )  # fmt: skip
    middle = whole
    if DENSE:
        middle = tl.minimum(tl.maximum(tl.cdiv(n - count, BLOCK) * BLOCK, inner), whole)
    acc, total, top = _blocks(
        acc, total, top, query, keys, values, mine, scale, cap, window, inner, middle, position, h, HK, least, n,
        D, DP, PAGE, BLOCK, False, CAP, PRECISION,
    )  # fmt: skip
    if DENSE:
        shift = q0 - (n - count)
        acc, total, top = _dense(
            acc, total, top, query, k, v, scale, cap, middle + shift, whole + shift, h * D, BLOCK, CAP, PRECISION,
        )  # fmt: skip
    acc, total, top = _blocks(
        acc, total, top, query, keys, values, mine, scale, cap, window, whole, end, position, h, HK, least, n,
        D, DP, PAGE, BLOCK, True, CAP, PRECISION,
    )  # fmt: skip
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + ((token * HQ + head) * D)[:, None] + d[None, :], result, mask=rows)


# By bytes of a number (1: bfloat16's queries over float8) and padded head: query rows and warps of a prefill's tile,
# and its keys on chips with little and with MUCH shared memory for a block. Those with much (Hopper on) multiply out of
# it, and have registers to spare.
PREFILL = {
    (1, 64): (64, 4, 64, 64),
    (1, 128): (64, 4, 32, 64),
    (1, 256): (64, 8, 32, 32),
    (2, 64): (64, 4, 64, 64),
    (2, 128): (64, 4, 32, 64),
    (2, 256): (64, 8, 32, 64),
    (4, 64): (64, 8, 32, 32),
    (4, 128): (32, 8, 16, 16),
    (4, 256): (16, 8, 16, 16),
}
MUCH = 200 << 10


@cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that one block may have."""
    if device.type == "cpu":
        return MUCH
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"])


def _columns(dim: int) -> int:
    """Of a head, in a block; products need 16."""
    return max(16, int(triton.next_power_of_2(dim)))


def _padded(dim: int) -> int:
    return max(64, int(triton.next_power_of_2(dim)))


def tile_rows(dim: int, bytes_each: int) -> int:
    """Query rows of one prefill tile, by the bytes of a number in the cache; of float32's over float8, of several."""
    return PREFILL[bytes_each, _padded(dim)][0]


def prefill_plan(q: torch.Tensor, eight: bool = False) -> Plan:
    rows, warps, *keys = PREFILL[_bytes(q, eight), _padded(q.shape[2])]
    much = _shared(q.device) >= MUCH
    plan = Plan(keys[much], warps, rows=rows, dense=much and q.element_size() == 2)
    return _cut("prefill", q, eight, plan)


def _descriptor(x: torch.Tensor, block: int) -> TensorDescriptor | None:
    """Of `block` rows of one head of x [T,Hk,D], if the hardware can read it so."""
    tokens, heads, dim = x.shape
    step = x.stride(0) * x.element_size()
    if dim < 16 or dim & (dim - 1) or x.stride(1) != dim or step % 16 or x.data_ptr() % 16:
        return None
    return TensorDescriptor(x, [tokens, heads * dim], [x.stride(0), 1], [block, dim])


def launch_prefill(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: KV, out: torch.Tensor, at: Paged, a: AttnSpec, plan: Plan
) -> None:
    _, heads, dim = q.shape
    page, kv_heads = kv[0].shape[1:3]
    group = heads // kv_heads
    dense = [_descriptor(x, plan.keys) for x in (k, v)] if plan.dense else [None, None]
    cuts = tile_rows(dim, kv[0].element_size()) // plan.rows
    _prefill[(heads, len(at.tiles) * cuts)](
        q, *dense, *kv, _sinks(q, a), out, at.cu_q, at.kv_len, at.page_start, at.pages, at.tiles, a.scale,
        a.softcap or 0.0, a.window or 1 << 30, q.stride(0), heads, kv_heads, group, gcd(group, plan.rows), dim,
        _columns(dim), page, plan.rows, cuts, plan.keys, None not in dense, a.window is not None,
        a.softcap is not None, a.sinks is not None, _precision(q), num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
