"""Kernels over rows: norms, rope, gated activation, the write into the cache, and the largest logit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from polyradix.backend.protocol import Gate
from polyradix_torch.triton.early import early, start
from polyradix_torch.triton.eight import nearest, wide

LANES = 1024  # columns of one program of the argmax
PLAN = ("positions", "slots", "tokens", "source")  # anywhere in a buffer: no code of its own for each


@triton.jit
def _norm(x, residual, w, out, total, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    v = tl.load(x + row * width + at, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        v += tl.load(residual + row * width + at, mask=mask, other=0.0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + row * width + at, rounded, mask=mask)
        v = rounded.to(tl.float32)
    scale = tl.math.div_rn(1.0, tl.math.sqrt_rn(tl.sum(v * v) / width + eps))  # rsqrt is off by too much
    weight = tl.load(w + at, mask=mask, other=0.0)
    tl.store(out + row * width + at, (v * scale * weight).to(out.dtype.element_ty), mask=mask)


def _warps(width: int) -> int:
    return int(min(16, max(1, triton.next_power_of_2(width) // 512)))


def rms_norm(x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """x [...,width], w [width] float32 -> the same shape. Over the last axis; statistics in float32."""
    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(width)
    _norm[(x.numel() // width,)](
        x, x, w, out, out, width, eps, False, block, **early(x.device), num_warps=_warps(width)
    )
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, w: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of residual + x (rounded first), and that sum: x and residual [T,width]."""
    x, residual = x.contiguous(), residual.contiguous()
    out, total, width = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    block = triton.next_power_of_2(width)
    _norm[(len(x),)](x, residual, w, out, total, width, eps, True, block, **early(x.device), num_warps=_warps(width))
    return out, total


@triton.jit
def turn(x, out, cos, sin, heads, STEP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr):
    """D columns of each head, which are STEP apart in x and D in out."""
    h, d = tl.arange(0, PADDED)[:, None], tl.arange(0, HALF)[None, :]
    mask = (h < heads) & (d < D // 2)
    a = tl.load(x + h * STEP + d, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + D // 2 + h * STEP + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + h * D + d, (a * cos - b * sin).to(out.dtype.element_ty), mask=mask)
    tl.store(out + D // 2 + h * D + d, (b * cos + a * sin).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize_on_alignment=PLAN)
def _rope(
    q, k, q_out, k_out, table, positions, q_row, k_row, HQ, HK,
    D: tl.constexpr, HALF: tl.constexpr, QP: tl.constexpr, KP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, HALF)[None, :]
    angle = table + tl.load(positions + row).to(tl.int64) * D + d
    cos = tl.load(angle, mask=d < D // 2, other=0.0)
    sin = tl.load(angle + D // 2, mask=d < D // 2, other=0.0)
    turn(q + row * q_row, q_out + row * HQ * D, cos, sin, HQ, D, D, HALF, QP)
    turn(k + row * k_row, k_out + row * HK * D, cos, sin, HK, D, D, HALF, KP)


def rope(
    q: torch.Tensor, k: torch.Tensor, table: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T,Hq,D] and k [T,Hk,D], whose heads are contiguous; table [positions,D] float32, cos then sin."""
    (rows, heads, dim), kv_heads = q.shape, k.shape[1]
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    half, padded = triton.next_power_of_2(dim // 2), triton.next_power_of_2(heads)
    _rope[(rows,)](
        q, k, q_out, k_out, table, positions, q.stride(0), k.stride(0), heads, kv_heads, dim, half, padded,
        triton.next_power_of_2(kv_heads), **early(q.device), num_warps=_warps(padded * half),
    )  # fmt: skip
    return q_out, k_out


@triton.jit
def silu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def gelu(gate, up):
    """By its tanh form, 2 sqrt(2/pi) = 1.5957..."""
    return gate / (1.0 + tl.exp(-1.5957691216057308 * gate * (1.0 + 0.044715 * gate * gate))) * up


@triton.jit
def clamped(gate, up, alpha, limit):
    gate = tl.minimum(gate, limit)
    return gate / (1.0 + tl.exp(-alpha * gate)) * (tl.minimum(tl.maximum(up, -limit), limit) + 1.0)


@triton.jit
def _gated(
    x, out, width, alpha, limit, GELU: tl.constexpr, CLAMPED: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    gate = tl.load(x + row * 2 * width + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * width + width + at, mask=mask, other=0.0).to(tl.float32)
    result = clamped(gate, up, alpha, limit) if CLAMPED else gelu(gate, up) if GELU else silu(gate, up)
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=mask)


def gated(x: torch.Tensor, kind: Gate, clamp: tuple[float, float] | None = None) -> torch.Tensor:
    """x [T,2F] -> [T,F]: act(first half) * second half; with `clamp` (alpha, limit) as of a MoeSpec."""
    width = x.shape[1] // 2
    out = x.new_empty(len(x), width)
    _gated[(len(x), triton.cdiv(width, 1024))](
        x.contiguous(), out, width, *(clamp or (0.0, 0.0)), kind == "gelu_tanh", clamp is not None, 1024,
        **early(x.device), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize_on_alignment=PLAN)
def _write(
    k, v, keys, values, k_held, v_held, slots, k_row, v_row, SIZE,
    BLOCK: tl.constexpr, EIGHT: tl.constexpr, HELD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < SIZE
    target = tl.load(slots + row).to(tl.int64) * SIZE + at
    key = tl.load(k + row * k_row + at, mask=mask)
    value = tl.load(v + row * v_row + at, mask=mask)  # both before the stores, which no load may overtake
    if EIGHT:
        key, value = nearest(key), nearest(value)
    tl.store(keys + target, key, mask=mask)
    tl.store(values + target, value, mask=mask)
    if HELD:
        tl.store(k_held + row * SIZE + at, wide(key, k_held.dtype.element_ty), mask=mask)
        tl.store(v_held + row * SIZE + at, wide(value, v_held.dtype.element_ty), mask=mask)


Pair = tuple[torch.Tensor, torch.Tensor]


def write(k: torch.Tensor, v: torch.Tensor, kv: Pair, slots: torch.Tensor, held: bool = True) -> Pair:
    """Row t of k and v [T,Hk,D], whose heads are contiguous, into slot slots[t] of the cache [pages,page,Hk,D]. Gives k
    and v as the cache holds them, if `held` is asked for: itself them, but for a cache of float8_e4m3fn."""
    size, eight = k.shape[1] * k.shape[2], kv[0].dtype == torch.float8_e4m3fn
    held, block = held and eight, triton.next_power_of_2(size)
    keys, values = (x.view(torch.uint8) if eight else x for x in kv)
    out = (k.new_empty(k.shape), v.new_empty(v.shape)) if held else (k, v)
    _write[(len(k),)](
        k, v, keys, values, *out, slots, k.stride(0), v.stride(0), size, block, eight, held, **early(k.device),
        num_warps=min(8, max(1, block // 256)),
    )  # fmt: skip
    return out


@triton.jit
def _best(x, value, index, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    start(EARLY)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = part * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + row * width + at, mask=at < width, other=-float("inf"))
    top, where = tl.max(v, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(value + row * tl.num_programs(1) + part, top)
    tl.store(index + row * tl.num_programs(1) + part, part * BLOCK + where)


@triton.jit
def _best_of(value, index, out, parts, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    start(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    v = tl.load(value + row * parts + at, mask=at < parts, other=-float("inf"))
    _, where = tl.max(v, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(out + row, tl.load(index + row * parts + where))


def argmax(x: torch.Tensor) -> torch.Tensor:
    """x [S,V] float32 -> i32[S], the lowest index among equals."""
    rows, width = x.shape
    parts = triton.cdiv(width, LANES)
    value = torch.empty(rows, parts, dtype=torch.float32, device=x.device)
    index = torch.empty(rows, parts, dtype=torch.int32, device=x.device)
    out = torch.empty(rows, dtype=torch.int32, device=x.device)
    _best[(rows, parts)](x.contiguous(), value, index, width, LANES, **early(x.device), num_warps=4)
    _best_of[(rows,)](value, index, out, parts, triton.next_power_of_2(parts), **early(x.device), num_warps=1)
    return out


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=PLAN)
def _take(tokens, source, prev, count, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    start(EARLY)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(source + at, mask=at < count, other=-1)
    token = tl.load(prev + row, mask=row >= 0, other=0)
    tl.store(tokens + at, token, mask=row >= 0)


def take_previous(tokens: torch.Tensor, source: torch.Tensor, prev: torch.Tensor) -> None:
    """tokens[t] = prev[source[t]] where source[t] >= 0, in place; all int32."""
    _take[(triton.cdiv(len(source), 1024),)](tokens, source, prev, len(source), 1024, **early(prev.device))
