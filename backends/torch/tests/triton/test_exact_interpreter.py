"""The patched interpreter against torch's own bfloat16 and float16, and the stock one's errors, which it cures."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

N = 64
TYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _dot(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@triton.jit
def _arithmetic(a, b, total, product, minus, less, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(total + i, x + y)
    tl.store(product + i, x * y)
    tl.store(minus + i, -x)
    tl.store(less + i, (x < y) & (x < 0.5))


@triton.jit
def _cast(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def _copy(x, out, count, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i, mask=i < count, other=0.0), mask=i < count)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _dot_error(dtype: torch.dtype) -> float:
    """Of a product of halves, summed in float32."""
    a, b, out = _random(N, N, dtype=dtype), _random(N, N, dtype=dtype).T.contiguous(), torch.empty(N, N)
    _dot[(1,)](a, b, out, N)
    return float((out - a.float() @ b.float()).abs().max())


def _wrong_casts(dtype: torch.dtype) -> int:
    """Of 4096 float32 values, ties between two halves and values beyond the largest among them."""
    x = _random(4096)
    x[:1024] = ((x[:1024].view(torch.int32) >> 16 << 16) + 0x8000).view(torch.float32)
    x[:4] = torch.tensor([0.0, -0.0, float("inf"), 1e30])
    out = torch.empty(4096, dtype=dtype)
    _cast[(1,)](x, out, 4096)
    return int((out.view(torch.int16) != x.to(dtype).view(torch.int16)).sum())


def _wrong_results(dtype: torch.dtype) -> int:
    """Of sums, products, negations and comparisons."""
    a, b = _random(2, 1024, dtype=dtype)
    got = [torch.empty(1024, dtype=dtype) for _ in range(3)] + [torch.empty(1024, dtype=torch.bool)]
    _arithmetic[(1,)](a, b, *got, 1024)
    return sum(int((x != y).sum()) for x, y in zip(got, (a + b, a * b, -a, (a < b) & (a < 0.5)), strict=True))


def test_stock_interpreter_is_wrong() -> None:
    """When this fails, Triton has cured it, and the patch can go."""
    assert _dot_error(torch.bfloat16) > 1e3
    assert _wrong_casts(torch.bfloat16) > 1000
    assert _wrong_results(torch.bfloat16) > 1000


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("dtype", TYPES)
def test_halves_are_exact(dtype: torch.dtype) -> None:
    assert _dot_error(dtype) < 1e-4
    assert _wrong_casts(dtype) == 0
    assert _wrong_results(dtype) == 0


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("dtype", TYPES)
def test_every_half_is_read_right(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(2**16)
    _cast[(1,)](every, out, 2**16)
    assert torch.equal(out.nan_to_num(nan=7.0), every.float().nan_to_num(nan=7.0))


@pytest.mark.usefixtures("exact")
def test_outside_is_refused() -> None:
    """One element too many, in a load and in a store; memory before a view, and what its mask hides, which is fine."""
    whole, out = torch.zeros(64), torch.zeros(64)
    _copy[(1,)](whole[:48], out[:48], 48, 64)
    with pytest.raises(InterpreterError, match="load of 1 addresses outside"):
        _copy[(1,)](whole[:47], out, 48, 64)
    with pytest.raises(InterpreterError, match="store of 1 addresses outside"):
        _copy[(1,)](whole, out[:47], 48, 64)


def test_stock_interpreter_reads_outside() -> None:
    _copy[(1,)](torch.zeros(64)[:47], torch.zeros(64), 48, 64)
