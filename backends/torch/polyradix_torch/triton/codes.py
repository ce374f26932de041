"""Linears with weights kept quantised. Of few rows the codes are read once and in order, and a block's sum is scaled in
float32; of many a dense weight is made first, and the product is torch's.

A program takes some rows of the weight, some of x, and all or a part of the columns. Of parts, the last program to
arrive adds all of a tile, in the order of the columns, so that sums depend on nothing but the shape.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from polyradix.backend.protocol import Quant
from polyradix_torch.quant import Codes
from polyradix_torch.triton import cuts
from polyradix_torch.triton.early import early, start
from polyradix_torch.triton.eight import readable, wide
from polyradix_torch.triton.skinny import TUNED, name_of, room

LEAST = 16  # columns that the matrix units take
WIDEST = 128  # columns of a block that are taken at a time
Form = Literal["lanes", "left", "right"]


@dataclass(frozen=True)
class Cut:
    """What a program takes at a time: rows of x, of the weight, and of their columns, which may be of several blocks.
    `splits` is the parts that columns go into. The weight is the left operand of the matrix units, or the right; or
    products are of lanes, of up to 4 rows of x. `fold` scales the weight, which is rounded then, instead of sums."""

    tokens: int
    rows: int
    depth: int
    warps: int
    stages: int
    splits: int = 1
    form: Form = "left"
    fold: bool = False


@triton.jit
def number(code, to: tl.constexpr):
    """Codes of float8_e4m3fn, none of which is NaN, -> `to`. By float32, for a GPU makes bfloat16 of float16 at a
    sixteenth of its rate."""
    if code.dtype == tl.float8e4nv:
        return code.to(tl.float16).to(tl.float32).to(to)
    else:
        return wide(code, to, NAN=False)


@triton.jit
def nibbles(pair, zero, NATIVE: tl.constexpr):
    """The low and the high codes of 4 bits of bytes `pair`, less zero [...] uint8 -> bfloat16. 128 and a code have bits
    that can be joined. NATIVE: by byte permutation, four bytes at a time."""
    if NATIVE:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            and.b32 low, $4, 0x0f0f0f0f;
            shr.u32 high, $4, 4;
            and.b32 high, high, 0x0f0f0f0f;
            prmt.b32 $0, low, 0x43434343, 0x4140;
            prmt.b32 $1, low, 0x43434343, 0x4342;
            prmt.b32 $2, high, 0x43434343, 0x4140;
            prmt.b32 $3, high, 0x43434343, 0x4342;
            }""",
            "=r,=r,=r,=r,r", [pair], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        low = ((pair & 15).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
        high = ((pair >> 4).to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    offset = (zero.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
    return low - offset, high - offset


@triton.jit
def _half(pair, HIGH: tl.constexpr, dtype: tl.constexpr):
    """The first or the second of two numbers, which lie in an integer."""
    BITS: tl.constexpr = dtype.primitive_bitwidth
    part = pair >> BITS if HIGH else pair
    return part.to(tl.uint16 if BITS == 16 else tl.uint32).to(dtype, bitcast=True)


@triton.jit
def _dot(x, w, acc, LEFT: tl.constexpr):
    if LEFT:
        return tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision="ieee")


@triton.jit
def _scaled(n, s, NATIVE: tl.constexpr, dtype: tl.constexpr):
    """bfloat16 n times float32 s, rounded to `dtype`. NATIVE: s is two bfloat16, so that two numbers are scaled at a
    time; what that changes is far below the rounding."""
    if NATIVE and dtype == tl.bfloat16:
        first = s.to(tl.bfloat16)
        rest = n * (s - first.to(tl.float32)).to(tl.bfloat16)
        return tl.fma(n, tl.broadcast_to(first, n.shape), rest)
    else:
        return (n.to(tl.float32) * s).to(dtype)


@triton.jit
def units(
    x, mine, codes, scale, zero, block, K, begin, end, WIDE, dtype: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, STEPS: tl.constexpr, FOUR: tl.constexpr,
    LEFT: tl.constexpr, FOLD: tl.constexpr, ONE: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """[ROWS,TOKENS] if LEFT, else [TOKENS,ROWS]: rows `x`, those that are `mine`, times rows `codes`, whose scales are
    from `block` on, which are the same for all if ONE. Two codes are in a byte if FOUR, and two columns of x in an
    integer. DEPTH columns are in one block; STEPS times as many are asked for at once."""
    PACK: tl.constexpr = 2 if FOUR else 1
    c = tl.arange(0, DEPTH // PACK)
    acc = tl.zeros((ROWS, TOKENS) if LEFT else (TOKENS, ROWS), tl.float32)
    first = tl.min(block, 0) if ONE else block
    for several in range(begin, end, DEPTH * STEPS):
        for step in tl.static_range(STEPS):
            k = several + step * DEPTH
            at, of = k // PACK + c[None, :], k // WIDE
            if EVEN:
                a = tl.load(x[:, None] + at, mask=mine[:, None], other=0.0)
                w = tl.load(codes[:, None] + at)
            else:
                a = tl.load(x[:, None] + at, mask=mine[:, None] & (at < K // PACK), other=0.0)
                w = tl.load(codes[:, None] + at, mask=at < K // PACK, other=0.0)
                of = tl.minimum(k, K - 1) // WIDE
            s = tl.load(scale + first + of)
            part = acc if FOLD else tl.zeros((ROWS, TOKENS) if LEFT else (TOKENS, ROWS), tl.float32)
            if FOUR:
                low, high = nibbles(w, tl.load(zero + block + of)[:, None], NATIVE)
                if FOLD:
                    low = _scaled(low, s if ONE else s[:, None], NATIVE, dtype)
                    high = _scaled(high, s if ONE else s[:, None], NATIVE, dtype)
                part = _dot(_half(a, False, dtype), low.to(dtype), part, LEFT)
                part = _dot(_half(a, True, dtype), high.to(dtype), part, LEFT)
            else:
                n = (number(w, tl.float32) * (s if ONE else s[:, None])).to(dtype) if FOLD else number(w, dtype)
                part = _dot(a, n, part, LEFT)
            if FOLD:
                acc = part
            elif ONE:
                acc += part * s
            else:
                acc += part * (s[:, None] if LEFT else s[None, :])
    return acc


@triton.jit
def _lanes(
    x, mine, codes, scale, zero, block, K, begin, end, WIDE, dtype: tl.constexpr,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SPAN: tl.constexpr, FOUR: tl.constexpr,
    EVEN: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """[TOKENS,ROWS]: the same by multiplying and adding, of DEPTH columns that are blocks of SPAN. Every thread reads
    its own x: both have one layout."""
    PACK: tl.constexpr = 2 if FOUR else 1
    first = tl.arange(0, DEPTH // SPAN)[None, None, :, None]
    c = first * (SPAN // PACK) + tl.arange(0, SPAN // PACK)[None, None, None, :]
    x = x[:, None, None, None] + tl.zeros((1, ROWS, DEPTH // SPAN, SPAN // PACK), tl.int32)
    acc = tl.zeros((TOKENS, ROWS, DEPTH // SPAN, SPAN // PACK), tl.float32)
    for k in range(begin, end, DEPTH):
        at, blocks = k // PACK + c, (k + first * SPAN) // WIDE
        if EVEN:
            a = tl.load(x + at)
            w = tl.load(codes[None, :, None, None] + at, eviction_policy="evict_first")
            s = tl.load(scale + block[None, :, None, None] + blocks)
        else:
            a = tl.load(x + at, mask=at < K // PACK, other=0.0)
            w = tl.load(codes[None, :, None, None] + at, mask=at < K // PACK, other=0.0)
            s = tl.load(scale + block[None, :, None, None] + blocks, mask=k + first * SPAN < K, other=0.0)
        if FOUR:
            if EVEN:
                z = tl.load(zero + block[None, :, None, None] + blocks)
            else:
                z = tl.load(zero + block[None, :, None, None] + blocks, mask=k + first * SPAN < K, other=0)
            low, high = nibbles(w, z, NATIVE)
            part = _half(a, False, dtype).to(tl.float32) * low.to(tl.float32)
            part += _half(a, True, dtype).to(tl.float32) * high.to(tl.float32)
            acc += part * s
        else:
            acc += a.to(tl.float32) * (number(w, tl.float32) * s)
    return tl.sum(tl.sum(acc, 3), 2)


@triton.jit(do_not_specialize=["M"])
def _codes(
    x, codes, scale, zero, bias, out, parts, arrived, M, N, K, WIDE,
    TALL: tl.constexpr, FOUR: tl.constexpr, BIAS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    DEPTH: tl.constexpr, SPAN: tl.constexpr, LANES: tl.constexpr, LEFT: tl.constexpr, FOLD: tl.constexpr,
    JOIN: tl.constexpr, EVEN: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """x [M,K], or of pairs of columns if FOUR, codes [N,K], two a byte if FOUR -> [M,N]."""
    start(EARLY)
    tile, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    broad = tl.cdiv(N, ROWS)
    m, n = tile // broad * TOKENS + tl.arange(0, TOKENS), tile % broad * ROWS + tl.arange(0, ROWS)
    PACK: tl.constexpr = 2 if FOUR else 1
    share = tl.cdiv(tl.cdiv(K, DEPTH), splits) * DEPTH
    begin = split * share
    end = tl.minimum(begin + share, K)
    row = tl.minimum(n, N - 1)
    block = row // TALL * tl.cdiv(K, WIDE)
    left = codes + row.to(tl.int64) * (K // PACK)
    right = x + tl.minimum(m, M - 1).to(tl.int64) * (K // PACK)
    dtype: tl.constexpr = out.dtype.element_ty
    if LANES:
        acc = _lanes(right, m < M, left, scale, zero, block, K, begin, end, WIDE, dtype, TOKENS, ROWS, DEPTH, SPAN,
                     FOUR, EVEN, NATIVE)  # fmt: skip
    else:
        acc = units(right, m < M, left, scale, zero, block, K, begin, end, WIDE, dtype, TOKENS, ROWS, SPAN,
                    DEPTH // SPAN, FOUR, LEFT, FOLD, TALL % ROWS == 0, EVEN, NATIVE)  # fmt: skip
        if LEFT:
            acc = tl.trans(acc)
    filled = M
    if JOIN:
        one = tl.arange(0, TOKENS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
        mine = parts + tile.to(tl.int64) * splits * TOKENS * ROWS
        tl.store(mine + split * TOKENS * ROWS + one, acc)
        tl.debug_barrier()  # the atomic below is one thread's: it must not overtake the others' stores
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == splits - 1
        filled = tl.where(last, M, 0)
        if last:
            acc = tl.zeros((TOKENS, ROWS), tl.float32)
            for s in range(splits):
                acc += tl.load(mine + s * TOKENS * ROWS + one, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
    if BIAS:
        acc += tl.load(bias + row).to(tl.float32)[None, :]
    to = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, acc.to(dtype), mask=(m < filled)[:, None] & (n < N)[None, :])


@triton.jit
def _dense(
    codes, scale, zero, out, N, K, WIDE,
    TALL: tl.constexpr, FOUR: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, SPAN: tl.constexpr,
    NATIVE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """codes [N,K], two a byte if FOUR -> [N,K], rounded once."""
    start(EARLY)
    PACK: tl.constexpr = 2 if FOUR else 1
    n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None, None]
    first = tl.program_id(1) * DEPTH + tl.arange(0, DEPTH // SPAN)[None, :, None] * SPAN
    at = first // PACK + tl.arange(0, SPAN // PACK)[None, None, :]
    row = n.to(tl.int64)
    w = tl.load(codes + row * (K // PACK) + at, mask=(n < N) & (at < K // PACK), other=0.0)
    block = n // TALL * tl.cdiv(K, WIDE) + first // WIDE
    real = (n < N) & (first < K)
    s = tl.load(scale + block, mask=real, other=0.0)
    if FOUR:
        z = tl.load(zero + block, mask=real, other=0)
        low, high = nibbles(w, z, NATIVE)
        value = tl.reshape(tl.join(low.to(tl.float32) * s, high.to(tl.float32) * s), (ROWS, DEPTH // SPAN, SPAN))
    else:
        value = number(w, tl.float32) * s
    c = first + tl.arange(0, SPAN)[None, None, :]
    tl.store(out + row * K + c, value.to(out.dtype.element_ty), mask=(n < N) & (c < K))


def fits(quant: Quant, width: int) -> bool:
    """Whether the kernels have products for such blocks of a weight of so many columns."""
    return span(quant, width) >= LEAST * (2 if quant.format == "int4" else 1)


def span(quant: Quant, width: int) -> int:
    """The most columns of one block at a time, a power of two."""
    columns = quant.block[1]
    return WIDEST if columns >= width else min(WIDEST, columns & -columns)


@cache
def native(device: torch.device) -> bool:
    """Whether kernels may have instructions of NVIDIA's."""
    return device.type != "cpu" and bool(triton.runtime.driver.active.get_current_target().backend == "cuda")


def paired(x: torch.Tensor, quant: Quant) -> torch.Tensor:
    """x, contiguous, as the kernels take it: for int4 two columns in an integer."""
    x = x.contiguous()
    if quant.format != "int4":
        return x
    if x.storage_offset() % 2:
        x = x.clone()
    return x.view(torch.int32 if x.element_size() == 2 else torch.int64)


def given(w: Codes) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales and zeros, as the kernels take them."""
    return readable(w.codes), w.scale, w.scale if w.zero is None else w.zero


def product(x: torch.Tensor, w: Codes, bias: torch.Tensor | None = None, cut: Cut | None = None) -> torch.Tensor:
    """x [M,K] times w [N,K], plus bias [N] -> [M,N], summed in float32 and rounded once. Without `cut` the product is
    cut as was measured to be fast, or is torch's with a weight [N,K] that is rounded to the dtype of x."""
    (count, k), n = x.shape, len(w.codes)
    cut = cut or chosen(x, w)
    if cut is None:
        return F.linear(x, dense(w, x.dtype), bias)
    depth, most = cut.depth, span(w.quant, k)
    out = x.new_empty(count, n)
    tiles = triton.cdiv(n, cut.rows) * triton.cdiv(count, cut.tokens)
    parts, arrived = room(out, cut.splits, tiles, cut.tokens, cut.rows)
    _codes[(tiles, cut.splits)](
        paired(x, w.quant), *given(w), out if bias is None else bias,
        out, parts, arrived, count, n, k, w.quant.block[1], w.quant.block[0], w.zero is not None, bias is not None,
        cut.tokens, cut.rows, depth, min(depth, most), cut.form == "lanes", cut.form == "left", cut.fold,
        cut.splits > 1, k % depth == 0, native(x.device), **early(x.device), num_warps=cut.warps, num_stages=cut.stages,
    )  # fmt: skip
    return out


def dense(w: Codes, dtype: torch.dtype, block: tuple[int, int, int] = (8, 512, 4)) -> torch.Tensor:
    """The weight [N,K], rounded once. A program takes rows and columns, with warps, as `block` has it."""
    n, k = len(w.codes), w.codes.shape[1] * (2 if w.zero is not None else 1)
    out, most, (rows, depth, warps) = torch.empty(n, k, dtype=dtype, device=w.codes.device), span(w.quant, k), block
    _dense[(triton.cdiv(n, rows), triton.cdiv(k, depth))](
        *given(w), out, n, k, w.quant.block[1], w.quant.block[0],
        w.zero is not None, rows, depth, most, native(out.device), **early(out.device), num_warps=warps,
    )  # fmt: skip
    return out


USUAL = {  # by the most rows of x, with programs to a processor; where there is none, the weight is made dense
    torch.bfloat16: (
        (16, Cut(16, 128, 128, 8, 3, form="right"), 2),
        (32, Cut(32, 128, 128, 8, 3), 2),
        (64, Cut(64, 128, 128, 8, 3), 1),
        (128, Cut(128, 64, 64, 4, 4, form="right", fold=True), 2),
    ),
    torch.float32: ((1 << 31, Cut(16, 32, 32, 4, 2), 0),),
}
EXPERTS = {  # by the most pairs that an expert has on average
    torch.bfloat16: (
        (8, Cut(16, 64, 128, 4, 4, form="right")),
        (32, Cut(32, 128, 128, 4, 3, form="right")),
        (64, Cut(64, 128, 128, 4, 3, form="right", fold=True)),
        (1 << 31, Cut(128, 128, 64, 8, 3, form="right", fold=True)),
    ),
    torch.float32: ((1 << 31, Cut(16, 32, 32, 4, 2)),),
}
PROCESSORS = 132  # what parts are meant for


def key_of(kind: Literal["linear", "experts"], quant: Quant, count: int, n: int, k: int) -> str:
    """Of a product's cut in the GPU's file, by the rows of x, of experts those that one has on average. 3 to 16 share
    a key, for the matrix units take 16."""
    block, rows = "x".join(map(str, quant.block)), triton.next_power_of_2(count)
    return f"{kind} {quant.format} {block} {rows if rows <= 2 else max(16, rows)} x {n} x {k}"


@cache
def _tuned(device: torch.device) -> dict[str, Cut | None]:
    path = TUNED / "codes" / name_of(device)
    products = json.loads(path.read_text())["products"] if path.exists() else {}
    return {key: cut and Cut(**cut) for key, cut in products.items()}


def chosen(x: torch.Tensor, w: Codes) -> Cut | None:
    """The cut that was fastest on this GPU, of a shape that was not tried there the usual one; None for a dense
    weight."""
    (n, _), k = w.codes.shape, x.shape[1]
    if x.dtype == torch.bfloat16:
        tuned, key = _tuned(x.device), key_of("linear", w.quant, len(x), n, k)
        if key in tuned:
            return tuned[key]
    cut = usual(x.dtype, len(x), n, k)
    return cut and _cut(x, cut)


def usual(dtype: torch.dtype, count: int, n: int, k: int) -> Cut | None:
    """Of a linear; its columns go into as many parts as run at once."""
    found = next(((cut, each) for most, cut, each in USUAL[dtype] if count <= most), None)
    return found and replace(found[0], splits=parts(found[0], count, n, k, found[1]))


def parts(cut: Cut, count: int, n: int, k: int, each: int) -> int:
    """That columns go into when a processor runs up to `each` programs, and no part has less than three steps."""
    tiles = triton.cdiv(n, cut.rows) * triton.cdiv(count, cut.tokens)
    return int(max(1, min(16, each * PROCESSORS // tiles, triton.cdiv(k, cut.depth) // 3)))


def chosen_experts(x: torch.Tensor, w: Codes, count: int) -> Cut:
    """As `chosen`, of experts that have `count` pairs on average."""
    key = key_of("experts", w.quant, count, w.codes.shape[1], x.shape[1])
    tuned = _tuned(x.device).get(key) if x.dtype == torch.bfloat16 else None
    return tuned or _cut(x, next(cut for most, cut in EXPERTS[x.dtype] if count <= most))


def _cut(x: torch.Tensor, usual: Cut) -> Cut:
    """With what the architecture needs otherwise."""
    return cuts.cut(x.device, "codes", f"{x.element_size()} x {usual.tokens}", usual)
