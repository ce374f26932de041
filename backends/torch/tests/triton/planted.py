"""One kernel for every gate of ahead-of-time compilation, which must not let it through."""

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
    """256 values a thread."""
    yield "spills", lambda: _softmax[(1,)](_empty(), _empty(), 128, num_warps=2)


def too_large() -> Iterator[Launch]:
    """Two operands of 64 KiB."""
    half = torch.bfloat16
    yield "too large", lambda: _product[(1,)](_empty(half), _empty(half), _empty(), 64, 512, 512, num_warps=4)
