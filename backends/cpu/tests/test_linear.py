from __future__ import annotations

import pytest
import torch

from polyradix_cpu import linear
from polyradix_cpu.linear import MOST, PackedLinear, rows_equal


def numbers(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("rows", [1, 3, 16, 17, MOST, 2 * MOST + 5])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("steady", [True, False])
def test_values(rows, bias, steady):
    x, w, b = numbers(rows, 70), numbers(50, 70), numbers(50)
    packed = PackedLinear(w, b if bias else None, torch.float32)
    packed.steady = steady
    expected = x.double() @ w.double().T + (b.double() if bias else 0)
    got = packed(x)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steady", [None, False])
def test_a_row_has_the_same_bits_in_any_batch(dtype, steady):
    packed = PackedLinear(numbers(192, 96, dtype=dtype), None, torch.float32)
    if steady is not None:
        packed.steady = steady
    x = numbers(150, 96, dtype=dtype)
    whole = packed(x)
    for rows in (1, 2, 3, 7, 64, 65):
        assert torch.equal(whole, torch.cat([packed(part) for part in x.split(rows)]))


def test_a_multiplier_that_depends_on_the_batch_is_caught():
    w = numbers(8, 12)
    assert rows_equal(lambda x: (x[:, None] * w).sum(-1), numbers(9, 12))
    assert not rows_equal(lambda x: (x[:, None] * w).sum(-1) * (1 + 1e-6 * (len(x) == 2)), numbers(9, 12))
    drifts = lambda x: (x[:, None] * w).sum(-1) + 1e-3 * torch.arange(len(x))[:, None]  # noqa: E731
    assert not rows_equal(drifts, numbers(9, 12))


def test_an_unsteady_multiplier_runs_in_padded_blocks(monkeypatch):
    seen = []

    def counting(weight, bias):
        def multiply(x):
            seen.append(len(x))
            return x @ weight.T + len(x)

        return multiply

    monkeypatch.setattr(linear, "multiplier", counting)
    linear._steady.cache_clear()
    packed = PackedLinear(numbers(5, 6), None, torch.float32)
    linear._steady.cache_clear()
    seen.clear()
    assert packed(numbers(37, 6)).shape == (37, 5)
    assert seen == [16, 16, 16]


def test_without_onednn_plain_linears_serve(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    w, x = numbers(5, 6), numbers(4, 6)
    assert (linear.multiplier(w, None)(x) - x.double() @ w.double().T).abs().max() < 1e-5
