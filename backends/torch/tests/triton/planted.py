"""Kernels for every gate of ahead-of-time compilation, which must not let them through."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from polyradix_torch.triton.launches import Launch


@triton.jit
def _softmax(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    e = tl.exp(tl.load(x + at))
    tl.store(out + at, e / tl.sum(tl.sum(e, 0), 0))


@triton.jit
def _product(a, b, out, N: tl.constexpr, K: tl.constexpr, L: tl.constexpr):
    n, k, m = tl.arange(0, N), tl.arange(0, K), tl.arange(0, L)
    product = tl.dot(tl.load(a + n[:, None] * K + k[None, :]), tl.load(b + m[:, None] * N + n[None, :]))
    tl.store(out + n[:, None] * N + n[None, :], product)


def _empty(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(1 << 16, dtype=dtype, device="meta")


def spills() -> Iterator[Launch]:
    """256 values a thread of 64."""
    yield "spills", lambda: _softmax[(1,)](_empty(), _empty(), 128, num_warps=2)


def spills_waves() -> Iterator[Launch]:
    """128 values a lane, of which eight waves leave it 64."""
    yield "spills", lambda: _softmax[(1,)](_empty(), _empty(), 128, num_warps=2, waves_per_eu=8)


def too_large() -> Iterator[Launch]:
    """Two operands of 64 KiB."""
    yield "too large", lambda: _multiply(torch.bfloat16, 64, 512, 512, num_warps=4)


def larger() -> Iterator[Launch]:
    """Two operands of 128 KiB."""
    yield "larger", lambda: _multiply(torch.bfloat16, 64, 1024, 1024, num_warps=8)


def by_lanes() -> Iterator[Launch]:
    """A product too small for matrix units."""
    yield "by lanes", lambda: _multiply(torch.bfloat16, 4, 4, 4)


def ocp() -> Iterator[Launch]:
    yield "e4m3fn", lambda: _multiply(torch.float8_e4m3fn, 64, 64, 64)


def fnuz() -> Iterator[Launch]:
    yield "e4m3fnuz", lambda: _multiply(torch.float8_e4m3fnuz, 64, 64, 64)


def gfx942() -> Iterator[Launch]:
    yield from spills_waves()
    yield from larger()
    yield from ocp()
    yield from fnuz()


def gfx950() -> Iterator[Launch]:
    yield from spills_waves()
    yield from by_lanes()
    yield from ocp()
    yield from fnuz()


def _multiply(dtype: torch.dtype, *shape: int, num_warps: int = 4) -> None:
    _product[(1,)](_empty(dtype), _empty(dtype), _empty(), *shape, num_warps=num_warps)
