"""Paged attention: split decode (Flash-Decoding, Dao et al., 2023) and ragged prefill (FlashAttention-2, Dao, 2023).

The cache is [pages, page, Hk, D]. A sequence's pages are a run of one flat list: pages[page_start[s] + i].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from polyradix.backend.protocol import AttnSpec

LOG2E = tl.constexpr(1.4426950408889634)
ROWS = 16  # the least rows of a matrix product; a kv head's query heads are padded up to it


@dataclass(frozen=True)
class Paged:
    """Where each sequence's keys are, and its query rows; int32 on the device. Sequences with one row are in `single`,
    their keys cut into `splits` parts; the others are in `tiles` [n,2] of (sequence, first query row in it)."""

    cu_q: torch.Tensor  # [S+1]
    kv_len: torch.Tensor  # [S]
    page_start: torch.Tensor  # [S]
    pages: torch.Tensor
    single: torch.Tensor
    splits: int
    tiles: torch.Tensor


@triton.jit
def _scores(q, k, scale, cap, CAP: tl.constexpr, PRECISION: tl.constexpr):
    """In units of log2."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if CAP:
        s = cap * (2.0 / (1.0 + tl.exp2(s * (-2.0 * LOG2E) / cap)) - 1.0)
    return s * LOG2E


@triton.jit
def _read(
    keys, values, mine, at, known, h, HK, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr
):  # fmt: skip
    """Keys and values [BLOCK,DP] of head h at positions `at`, zeros where not `known`."""
    d = tl.arange(0, DP)
    page = tl.load(mine + at // PAGE, mask=known, other=0).to(tl.int64)
    row = ((page * PAGE + at % PAGE) * HK + h) * D
    inside = known[:, None] & (d < D)[None, :]
    k = tl.load(keys + row[:, None] + d[None, :], mask=inside, other=0.0)
    return k, tl.load(values + row[:, None] + d[None, :], mask=inside, other=0.0)


@triton.jit
def _add(acc, total, top, score, v, PRECISION: tl.constexpr):
    """One block of keys added to the running sums, maximum included."""
    new = tl.maximum(top, tl.max(score, 1))
    fix = tl.exp2(top - new)
    p = tl.exp2(score - new[:, None])
    total = total * fix + tl.sum(p, 1)
    return acc * fix[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION), total, new


@triton.jit
def _decode(
    q, keys, values, out, part, lse, single, cu_q, kv_len, page_start, pages, scale, cap, window, q_row, HK,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i, h, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    s = tl.load(single + i)
    token = tl.load(cu_q + s).to(tl.int64)
    n = tl.load(kv_len + s)
    first = tl.maximum(n - window, 0)
    share = tl.cdiv(tl.cdiv(n - first, SPLITS), BLOCK) * BLOCK
    begin = first + split * share
    end = tl.minimum(begin + share, n)
    g, d = tl.arange(0, GP), tl.arange(0, DP)
    rows = (g < G)[:, None] & (d < D)[None, :]
    query = tl.load(q + token * q_row + (h * G + g)[:, None] * D + d[None, :], mask=rows, other=0.0)
    mine = pages + tl.load(page_start + s)
    top = tl.full((GP,), -1e30, tl.float32)
    total = tl.zeros((GP,), tl.float32)
    acc = tl.zeros((GP, DP), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        k, v = _read(keys, values, mine, at, at < end, h, HK, D, DP, PAGE)
        score = tl.where((at < end)[None, :], _scores(query, k, scale, cap, CAP, PRECISION), -float("inf"))
        acc, total, top = _add(acc, total, top, score, v, PRECISION)
    if SPLITS == 1:
        result = acc / total[:, None]
        head = token * HK * G + h * G + g
        tl.store(out + head[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=rows)
    else:
        place = (i * HK * G + h * G + g) * SPLITS + split
        tl.store(part + place[:, None] * D + d[None, :], acc / tl.maximum(total, 1e-30)[:, None], mask=rows)
        tl.store(lse + place, tl.where(total > 0, top + tl.log2(tl.maximum(total, 1e-30)), -float("inf")), mask=g < G)


@triton.jit
def _merge(part, lse, out, single, cu_q, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr):
    heads, h = tl.num_programs(1), tl.program_id(1)
    head = tl.program_id(0).to(tl.int64) * heads + h
    token = tl.load(cu_q + tl.load(single + tl.program_id(0))).to(tl.int64)
    i, d = tl.arange(0, PADDED), tl.arange(0, DP)
    logs = tl.load(lse + head * SPLITS + i, mask=i < SPLITS, other=-float("inf"))
    weight = tl.exp2(logs - tl.max(logs, 0))
    inside = (i < SPLITS)[:, None] & (d < D)[None, :]
    x = tl.load(part + (head * SPLITS + i)[:, None] * D + d[None, :], mask=inside, other=0.0)
    result = tl.sum(x * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + (token * heads + h) * D + d, result.to(out.dtype.element_ty), mask=d < D)


def _precision(x: torch.Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def attend(q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], at: Paged, a: AttnSpec) -> torch.Tensor:
    """Each sequence's query rows, its newest tokens, over its keys: q [T,Hq,D] -> [T,Hq*D]."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if len(at.single):
        _launch_decode(q, kv, out, at, a)
    if len(at.tiles):
        _launch_prefill(q, kv, out, at, a)
    return out.flatten(1)


def _launch_decode(
    q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor, at: Paged, a: AttnSpec
) -> None:
    count, (_, heads, dim), splits = len(at.single), q.shape, at.splits
    page, kv_heads = kv[0].shape[1:3]
    group, wide = heads // kv_heads, triton.next_power_of_2(dim)
    part, lse = out, out
    if splits > 1:
        part = torch.empty(count, heads, splits, dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(count, heads, splits, dtype=torch.float32, device=q.device)
    block = 64 if wide * q.element_size() <= 256 else 64 // q.element_size()
    _decode[(count, kv_heads, splits)](
        q, *kv, out, part, lse, at.single, at.cu_q, at.kv_len, at.page_start, at.pages, a.scale, a.softcap or 0.0,
        a.window or 1 << 30, q.stride(0), kv_heads, group, max(ROWS, triton.next_power_of_2(group)), dim, wide, page,
        block, splits, a.softcap is not None, _precision(q), num_warps=4, num_stages=3,
    )  # fmt: skip
    if splits > 1:
        padded = triton.next_power_of_2(splits)
        _merge[(count, heads)](part, lse, out, at.single, at.cu_q, dim, wide, splits, padded, num_warps=2)


@triton.jit
def _blocks(
    acc, total, top, query, keys, values, mine, scale, cap, window, begin, end, position, h, HK, n,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        k, v = _read(keys, values, mine, at, at < n, h, HK, D, DP, PAGE)
        score = _scores(query, k, scale, cap, CAP, PRECISION)
        if MASKED:
            seen = (at[None, :] <= position[:, None]) & (at[None, :] > position[:, None] - window)
            score = tl.where(seen, score, -float("inf"))
        acc, total, top = _add(acc, total, top, score, v, PRECISION)
    return acc, total, top


@triton.jit
def _prefill(
    q, keys, values, out, cu_q, kv_len, page_start, pages, tiles, scale, cap, window, q_row, HQ, HK,
    G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
    CAP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)  # the longest first
    s, first = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    q0 = tl.load(cu_q + s)
    count, n = tl.load(cu_q + s + 1) - q0, tl.load(kv_len + s)
    i, d = first + tl.arange(0, TILE), tl.arange(0, DP)
    position = n - count + i
    rows = (i < count)[:, None] & (d < D)[None, :]
    token = (q0 + i).to(tl.int64)
    query = tl.load(q + token[:, None] * q_row + head * D + d[None, :], mask=rows, other=0.0)
    mine = pages + tl.load(page_start + s)
    top = tl.full((TILE,), -1e30, tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    acc = tl.zeros((TILE, DP), tl.float32)
    low = n - count + first  # the first row's position
    end = tl.minimum(low + TILE, n)
    begin = tl.maximum(low - window + 1, 0) // BLOCK * BLOCK
    whole = tl.maximum((low + 1) // BLOCK * BLOCK, begin)  # blocks before it are seen by every row
    inner = begin
    if window < (1 << 30):
        inner = tl.minimum(tl.maximum(tl.cdiv(low + TILE - window, BLOCK) * BLOCK, begin), whole)
    h = head // G
    acc, total, top = _blocks(
        acc, total, top, query, keys, values, mine, scale, cap, window, begin, inner, position, h, HK, n,
        D, DP, PAGE, BLOCK, True, CAP, PRECISION,
    )  # fmt: skip
    acc, total, top = _blocks(
        acc, total, top, query, keys, values, mine, scale, cap, window, inner, whole, position, h, HK, n,
        D, DP, PAGE, BLOCK, False, CAP, PRECISION,
    )  # fmt: skip
    acc, total, top = _blocks(
        acc, total, top, query, keys, values, mine, scale, cap, window, whole, end, position, h, HK, n,
        D, DP, PAGE, BLOCK, True, CAP, PRECISION,
    )  # fmt: skip
    result = acc / total[:, None]
    tl.store(out + (token[:, None] * HQ + head) * D + d[None, :], result.to(out.dtype.element_ty), mask=rows)


# By bytes of a number and padded head: query rows and warps of a prefill's tile, and its keys on chips with little and
# with MUCH shared memory for a block. Those with much (Hopper on) multiply out of it, and have registers to spare.
PREFILL = {
    (2, 64): (128, 8, 64, 64),
    (2, 128): (128, 8, 32, 64),
    (2, 256): (64, 8, 32, 64),
    (4, 64): (64, 8, 32, 32),
    (4, 128): (32, 8, 16, 16),
    (4, 256): (16, 8, 16, 16),
}
MUCH = 200 << 10


@cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that one block may have."""
    if device.type != "cuda":
        return MUCH
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def _padded(dim: int) -> int:
    return max(64, int(triton.next_power_of_2(dim)))


def tile_rows(dim: int, bytes_each: int) -> int:
    """Query rows of one prefill tile."""
    return PREFILL[bytes_each, _padded(dim)][0]


def _launch_prefill(
    q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor, at: Paged, a: AttnSpec
) -> None:
    _, heads, dim = q.shape
    page, kv_heads = kv[0].shape[1:3]
    tile, warps, *keys = PREFILL[q.element_size(), _padded(dim)]
    _prefill[(heads, len(at.tiles))](
        q, *kv, out, at.cu_q, at.kv_len, at.page_start, at.pages, at.tiles, a.scale, a.softcap or 0.0,
        a.window or 1 << 30, q.stride(0), heads, kv_heads, heads // kv_heads, dim, triton.next_power_of_2(dim), page,
        tile, keys[_shared(q.device) >= MUCH], a.softcap is not None, _precision(q), num_warps=warps, num_stages=3,
    )  # fmt: skip
