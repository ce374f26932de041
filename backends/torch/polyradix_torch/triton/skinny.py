"""Products of few rows, x [M,K] times w [N,K] in bfloat16: they cost what reading the weight costs, once and in order.

A program takes some rows of the weight, and all or a part of the columns. Of parts, the last program to arrive adds
all of a tile, in the order of the columns, so that sums depend on nothing but the shape. Of many rows of x it may take
only some, and then reads both through tensor descriptors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from triton.tools.tensor_descriptor import TensorDescriptor

from polyradix_torch.triton.early import early, start
from polyradix_torch.triton.rows import silu

LEAST = 16  # rows of x in a product by the matrix units
TUNED = Path(__file__).parent / "tuned"
TILES = 1 << 16  # at most so many of a product whose columns are split
Kind = Literal["linear", "gated", "logits"]


@dataclass(frozen=True)
class Tile:
    """How a product is cut: rows and columns of the weight that a program takes at a time, and into how many parts the
    columns go. `dot` pads x to 16 rows for the matrix units; without, M is up to 4. `ahead` columns of each row,
    a multiple of 256, are asked for before the kernel that makes x has ended. `tokens` rows of x are taken at a time,
    through tensor descriptors; at 0 all are."""

    rows: int
    columns: int
    warps: int
    stages: int
    splits: int = 1
    dot: bool = False
    ahead: int = 0
    tokens: int = 0


@triton.jit
def ask(w, K, begin, ahead):
    """Brings `ahead` columns of rows `w` into the L2 cache, by lines of 128 bytes."""
    for c in range(0, ahead, 256):
        at = w[:, None] + tl.minimum(begin + c + tl.arange(0, 4) * 64, K - 1)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _units(x, w, K, begin, end, MP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
           EVEN: tl.constexpr):  # fmt: skip
    """[MP,ROWS]: rows `x` times rows `w` by the matrix units."""
    c = tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, MP), tl.float32)
    for k in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        if EVEN:
            a = tl.load(w[:, None] + (k + c)[None, :], eviction_policy="evict_first")
            b = tl.load(x[:, None] + (k + c)[None, :])
        else:
            a = tl.load(w[:, None] + (k + c)[None, :], mask=(k + c < K)[None, :], other=0.0)
            b = tl.load(x[:, None] + (k + c)[None, :], mask=(k + c < K)[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc)
    return tl.trans(acc)


@triton.jit
def _lanes(x, w, K, begin, end, MP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
           EVEN: tl.constexpr):  # fmt: skip
    """[MP,ROWS]: the same by multiplying and adding. Every thread reads its own x: both have one layout."""
    c = tl.arange(0, COLUMNS)[None, None, :]
    x = x[:, None, None] + tl.zeros((1, ROWS, COLUMNS), tl.int32)
    acc = tl.zeros((MP, ROWS, COLUMNS), tl.float32)
    for k in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        if EVEN:
            a = tl.load(w[None, :, None] + k + c, eviction_policy="evict_first")
            b = tl.load(x + k + c)
        else:
            a = tl.load(w[None, :, None] + k + c, mask=k + c < K, other=0.0)
            b = tl.load(x + k + c, mask=k + c < K, other=0.0)
        acc += a.to(tl.float32) * b.to(tl.float32)
    return tl.sum(acc, 2)


@triton.jit
def _finish(total, bias, out, tile, row, m, M, N, MP: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr,
            BIAS: tl.constexpr):  # fmt: skip
    if BIAS:
        total += tl.load(bias + row).to(tl.float32)[None, :]
    if GATED:
        gate, up = tl.split(tl.reshape(total, (MP, ROWS // 2, 2)))
        total = silu(gate, up)
    WIDE: tl.constexpr = ROWS // 2 if GATED else ROWS
    width = N // 2 if GATED else N
    n = tile * WIDE + tl.arange(0, WIDE)
    at = out + m[:, None] * width + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=["M", "ahead"])
def _product(
    x, w, bias, out, parts, arrived, M, N, K, ahead,
    MP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, JOIN: tl.constexpr, EVEN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    m, r = tl.arange(0, MP), tile * ROWS + tl.arange(0, ROWS)
    row = r // 2 + r % 2 * (N // 2) if GATED else r
    row = tl.minimum(row, N - 1).to(tl.int64)
    share = tl.cdiv(tl.cdiv(K, COLUMNS), splits) * COLUMNS
    begin = split * share
    end = tl.minimum(begin + share, K)
    mine, given = w + row * K, x + tl.minimum(m, M - 1) * K
    if EARLY:  # only the weight may be read before the wait, and nothing may be written
        cuda.gdc_launch_dependents()
        ask(mine, K, begin, ahead)
        cuda.gdc_wait()
    if DOT:
        total = _units(given, mine, K, begin, end, MP, ROWS, COLUMNS, STAGES, EVEN)
    else:
        total = _lanes(given, mine, K, begin, end, MP, ROWS, COLUMNS, STAGES, EVEN)
    if JOIN:
        one = m[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        step = tl.num_programs(0) * MP * ROWS
        parts += tile * MP * ROWS
        tl.store(parts + split * step + one, total)
        tl.debug_barrier()  # the atomic below is one thread's: it must not overtake the others' stores
        if tl.atomic_add(arrived + tile, 1, sem="acq_rel") == splits - 1:
            total = tl.zeros((MP, ROWS), tl.float32)
            for s in range(splits):
                total += tl.load(parts + s * step + one, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
            _finish(total, bias, out, tile, row, m, M, N, MP, ROWS, GATED, BIAS)
    else:
        _finish(total, bias, out, tile, row, m, M, N, MP, ROWS, GATED, BIAS)


@triton.jit
def _place(tile, tall, broad):
    """Row and column of a tile: eight rows of them, column by column, so that the L2 cache holds what they share."""
    first = tile // (8 * broad) * 8
    height = tl.minimum(tall - first, 8)
    tile %= 8 * broad
    return first + tile % height, tile // height


@triton.jit(do_not_specialize=["M", "splits"])
def _wide(
    x, w, bias, out, parts, arrived, M, N, K, splits,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    JOIN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x and w are descriptors of blocks [TOKENS,COLUMNS] and [WIDE,COLUMNS]; zeros come from beyond their ends."""
    start(EARLY)
    WIDE: tl.constexpr = ROWS // 2 if GATED else ROWS
    width = N // 2 if GATED else N
    tall, broad = tl.cdiv(M, TOKENS), tl.cdiv(width, WIDE)
    share = tl.cdiv(tl.cdiv(K, COLUMNS), splits) * COLUMNS
    for item in tl.range(tl.program_id(0), tall * broad * splits, tl.num_programs(0), flatten=not JOIN):
        tile, split = item // splits, item % splits
        i, j = _place(tile, tall, broad)
        acc = tl.zeros((TOKENS, WIDE), tl.float32)
        up = tl.zeros((TOKENS, WIDE), tl.float32)
        for k in range(split * share, tl.minimum(split * share + share, K), COLUMNS):
            a = x.load([i * TOKENS, k])
            acc = tl.dot(a, tl.trans(w.load([j * WIDE, k])), acc)
            if GATED:
                up = tl.dot(a, tl.trans(w.load([width + j * WIDE, k])), up)
        m, n = i * TOKENS + tl.arange(0, TOKENS), j * WIDE + tl.arange(0, WIDE)
        filled = M
        if JOIN:
            one = tl.arange(0, TOKENS)[:, None] * WIDE + tl.arange(0, WIDE)[None, :]
            mine = parts + tile.to(tl.int64) * splits * TOKENS * WIDE
            tl.store(mine + split * TOKENS * WIDE + one, acc)
            tl.debug_barrier()  # as in _product
            last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == splits - 1
            filled = tl.where(last, M, 0)
            if last:
                acc = tl.zeros((TOKENS, WIDE), tl.float32)
                for s in range(splits):
                    acc += tl.load(mine + s * TOKENS * WIDE + one, cache_modifier=".cg")
                tl.store(arrived + tile, 0)
        if BIAS:
            acc += tl.load(bias + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
            if GATED:
                up += tl.load(bias + width + n, mask=n < width, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc = silu(acc, up)
        at = out + m.to(tl.int64)[:, None] * width + n[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=(m < filled)[:, None] & (n < width)[None, :])


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def arrivals(device: torch.device) -> torch.Tensor:
    """Parts that are there, by tile. Zero between launches, each of which sets it back; one stream uses it."""
    return torch.zeros(TILES, dtype=torch.int32, device=device)


def room(out: torch.Tensor, splits: int, tiles: int, tokens: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For the parts [splits,tiles,tokens,rows] of a product, float32, and their arrivals; `out` stands for both where
    there is one. Raises ValueError for too many tiles."""
    if splits == 1:
        return out, out
    if tiles > TILES:
        raise ValueError(f"{tiles} tiles of {rows} rows cannot be split; expected at most {TILES}")
    return torch.empty(splits, tiles, tokens, rows, dtype=torch.float32, device=out.device), arrivals(out.device)


def product(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, tile: Tile, kind: Kind = "linear"
) -> torch.Tensor:
    """x [M,K] and w [N,K] bfloat16, bias [N] -> [M,N], summed in float32 and rounded once; float32 for "logits".

    "gated" -> [M,N/2]: silu of the first half of the sums times the second. Without `tile.dot` M is up to 4.
    """
    (count, k), n = x.shape, len(w)
    dtype, x = torch.float32 if kind == "logits" else x.dtype, x.contiguous()
    out = torch.empty(count, n // 2 if kind == "gated" else n, dtype=dtype, device=x.device)
    padded = max(LEAST, triton.next_power_of_2(count)) if tile.dot else triton.next_power_of_2(count)
    each = tile.tokens or padded
    if kind == "gated" and tile.tokens and tile.splits > 1:
        raise ValueError("a gated product with tile.tokens cannot be split")
    tiles = triton.cdiv(n, tile.rows) * triton.cdiv(count, each)
    parts, arrived = room(out, tile.splits, tiles, each, tile.rows)
    rest = w if bias is None else bias, out, parts, arrived, count, n, k
    how = kind == "gated", bias is not None, tile.splits > 1
    if tile.tokens:
        broad = tile.rows // 2 if kind == "gated" else tile.rows
        given = (_blocks(part, size, tile.columns) for part, size in ((x, each), (w, broad)))
        programs, processors = tiles * tile.splits, _processors(x.device)
        _wide[(programs if tile.splits > 1 or programs < 4 * processors else processors,)](
            *given, *rest, tile.splits, each, tile.rows, tile.columns, *how, **early(x.device),
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    else:
        _product[(tiles, tile.splits)](
            x, w, *rest, tile.ahead, padded, tile.rows, tile.columns, tile.stages, tile.dot, *how,
            k % tile.columns == 0, **early(x.device), num_warps=tile.warps,
        )  # fmt: skip
    return out


def _blocks(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [rows, columns])


def name_of(device: torch.device) -> str:
    """Of the file with the GPU's tuned tiles."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name.replace(' ', '_')}.json"


@cache
def _tuned(device: torch.device) -> dict[str, Tile | None]:
    path = TUNED / name_of(device)
    products = json.loads(path.read_text())["products"] if path.exists() else {}
    return {key: tile and Tile(**tile) for key, tile in products.items()}


def key_of(kind: Kind, count: int, n: int, k: int) -> str:
    """Of a product's tile in the file; `count` rows of x share it with all up to the next power of two."""
    return f"{kind} {triton.next_power_of_2(count)} x {n} x {k}"


def chosen(kind: Kind, x: torch.Tensor, w: torch.Tensor) -> Tile | None:
    """The tile that was measured to be faster than torch on this GPU; None where none was, or none was tried."""
    if not len(x) or not x.dtype == w.dtype == torch.bfloat16:
        return None
    return _tuned(x.device).get(key_of(kind, len(x), *w.shape))
