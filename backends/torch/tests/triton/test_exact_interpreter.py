"""The patched interpreter against torch's own narrow floats, and the stock one's errors, which it cures."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

N = 64
TYPES = (torch.bfloat16, torch.float16)
EIGHTS = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


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


@triton.jit
def _count(x, at, N: tl.constexpr):
    tl.atomic_add(x + tl.load(at + tl.arange(0, N)), 1)


@triton.jit
def _swap(x, at):
    tl.atomic_cas(x + at, 0, 1)


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
    return _wrong(x, dtype)


def _wrong_eights(dtype: torch.dtype) -> int:
    """Of every finite value of `dtype` and every middle of two, which is a tie, subnormal ones and zeros included."""
    every = _codes(dtype).float()
    exact = every[every.isfinite()].sort().values
    return _wrong(torch.cat([exact, (exact[1:] + exact[:-1]) / 2, torch.zeros(1)]), dtype)


def _wrong(x: torch.Tensor, dtype: torch.dtype) -> int:
    size = triton.next_power_of_2(len(x))
    x = torch.cat([x, x[: size - len(x)]])
    out = torch.empty(size, dtype=dtype)
    _cast[(1,)](x, out, size)
    whole = torch.int8 if dtype in EIGHTS else torch.int16
    return int((out.view(whole) != x.to(dtype).view(whole)).sum())


def _codes(dtype: torch.dtype) -> torch.Tensor:
    """All that there are."""
    whole = torch.int8 if dtype in EIGHTS else torch.int16
    bits = 8 * whole.itemsize
    return torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(whole).view(dtype)


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
@pytest.mark.parametrize("dtype", EIGHTS)
def test_eights_are_exact(dtype: torch.dtype) -> None:
    assert _dot_error(dtype) < 1e-4
    assert _wrong_eights(dtype) == 0


@pytest.mark.parametrize("dtype", EIGHTS)
def test_stock_interpreter_casts_eights_wrong(dtype: torch.dtype) -> None:
    assert _wrong_eights(dtype) > 50


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("dtype", [*TYPES, *EIGHTS])
def test_every_code_is_read_right(dtype: torch.dtype) -> None:
    codes = _codes(dtype)
    out = torch.empty(len(codes))
    _cast[(1,)](codes, out, len(codes))
    assert torch.equal(out.nan_to_num(nan=7.0), codes.float().nan_to_num(nan=7.0))


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float8_e4m3fn, 448.0), (torch.float8_e4m3fnuz, 240.0)])
def test_eights_overflow(dtype: torch.dtype, largest: float) -> None:
    """What rounds to the largest is fine, and so is NaN; chips do not agree on more."""
    out = torch.empty(2, dtype=dtype)
    _cast[(1,)](torch.tensor([largest * 1.03, float("nan")]), out, 2)
    assert out[0].float() == largest
    assert out[1].isnan()
    with pytest.raises(InterpreterError, match="clamp it first"):
        _cast[(1,)](torch.tensor([1.0, largest * 1.1]), out, 2)


@pytest.mark.usefixtures("exact")
def test_outside_is_refused() -> None:
    """One element too many, in a load and in a store; what its mask hides is fine."""
    whole, out = torch.zeros(64), torch.zeros(64)
    _copy[(1,)](whole[:48], out[:48], 48, 64)
    with pytest.raises(InterpreterError, match="load of 1 addresses outside"):
        _copy[(1,)](whole[:47], out, 48, 64)
    with pytest.raises(InterpreterError, match="store of 1 addresses outside"):
        _copy[(1,)](whole, out[:47], 48, 64)


@pytest.mark.usefixtures("exact")
def test_another_argument_is_outside() -> None:
    """Of the same launch, next to the tensor that is overrun at its end or at its start."""
    whole = torch.zeros(128)
    with pytest.raises(InterpreterError, match="load of 1 addresses outside"):
        _copy[(1,)](whole[:47], whole[47:95], 48, 64)
    at, counts = torch.zeros(64, dtype=torch.int32).split([32, 32])
    at[0] = -1
    with pytest.raises(InterpreterError, match="atomic_rmw of 1 addresses outside"):
        _count[(1,)](counts, at, 32)
    with pytest.raises(InterpreterError, match="atomic_cas of 1 addresses outside"):
        _swap[(1,)](counts, 32)
    _swap[(1,)](counts, 31)
    assert counts.tolist() == [0] * 31 + [1]


def test_stock_interpreter_reads_outside() -> None:
    _copy[(1,)](torch.zeros(64)[:47], torch.zeros(64), 48, 64)
