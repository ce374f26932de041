"""The row-wise verbs and linears of the native kernels against NumPy in float64, at sizes that leave tails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import Heads
from polyradix_cpu.native import NativeMeta, NativeOps, NativeWeight, load
from polyradix_cpu.native.params import pack_linear

DTYPES = [torch.float32, torch.bfloat16]
STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}  # half a unit in the last place, relative


@pytest.fixture(scope="module")
def ops() -> NativeOps:
    library = load()
    assert library is not None, "no native library: build it with `pip install -e backends/cpu`"
    return NativeOps(library, threads=2)


def randn(*shape: int, seed: int = 0, dtype: Any = torch.float32) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def f64(x: Any) -> Any:
    return x.double().numpy()


def close(got: Any, want: Any, dtype: Any, sums: int = 1) -> None:
    """Within rounding of the result plus that of `sums` float32 additions of its size."""
    bound = np.abs(want) * STEP[dtype] * 1.01 + np.abs(want).max() * sums * 2.0**-24 + 1e-30
    assert (np.abs(f64(got) - want) <= bound).all()


def weight(w: Any, kind: str = "norm") -> NativeWeight:
    return NativeWeight(kind, w, tuple(w.shape))


def batch(tokens: list[int], positions: list[int], cu_q: list[int]) -> NativeMeta:
    def i32(x: list[int]) -> Any:
        return np.array(x, np.int32)

    zeros = i32([0] * len(tokens))
    seqs = len(cu_q) - 1
    return NativeMeta(
        HostBatch(
            i32(tokens), i32(positions), zeros, i32(cu_q), i32([1] * seqs), np.zeros((seqs, 1), np.int32),
            i32([c - 1 for c in cu_q[1:]]), zeros - 1,
        )
    )  # fmt: skip


def silu(x: Any) -> Any:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(1, 48), (70, 48), (96, 576), (34, 130), (64, 32)])
def test_linear(ops: NativeOps, dtype: Any, n: int, k: int) -> None:
    w, x, bias = randn(n, k, dtype=dtype), randn(70, k, seed=1, dtype=dtype), randn(n, seed=2)
    want = f64(x) @ f64(w).T + f64(bias)
    for gated in [False] + [True] * (n % 2 == 0):
        packed = pack_linear(w, bias, gated)
        for m in (1, 2, 3, 4, 5, 6, 7, 12, 13, 33, 70):
            close(ops.linear(x[:m], packed), want[:m], dtype, k)
    logits = ops.logits(x, pack_linear(w))
    assert logits.dtype == torch.float32
    close(logits, f64(x) @ f64(w).T, torch.float32, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", [16, 35, 96])
def test_gated_linear(ops: NativeOps, dtype: Any, f: int) -> None:
    w, x = randn(2 * f, 64, dtype=dtype) / 8, randn(9, 64, seed=1, dtype=dtype)
    y = f64(x) @ f64(w).T
    close(ops.linear_gated(x, pack_linear(w, gated=True), "silu"), silu(y[:, :f]) * y[:, f:], dtype, 64)
    z = randn(9, 2 * f, seed=3, dtype=dtype) * 20
    close(ops.gated(z, "silu"), silu(f64(z)[:, :f]) * f64(z)[:, f:], dtype, 8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_in_every_batch(ops: NativeOps, dtype: Any) -> None:
    w, x = pack_linear(randn(160, 200, dtype=dtype), randn(160), True), randn(300, 200, seed=1, dtype=dtype)
    whole, gated = ops.linear(x, w), ops.linear_gated(x, w, "silu")
    for m in (1, 2, 3, 5, 6, 7, 16, 17, 64, 199):
        for start in (0, 4, 97):
            assert torch.equal(ops.linear(x[start : start + m], w), whole[start : start + m])
            assert torch.equal(ops.linear_gated(x[start : start + m], w, "silu"), gated[start : start + m])


def test_linear_refuses_what_it_cannot_multiply(ops: NativeOps) -> None:
    w = pack_linear(randn(32, 48))
    with pytest.raises(ValueError, match=r"expected \[T,48\]"):
        ops.linear(randn(3, 47), w)
    with pytest.raises(ValueError, match="float32"):
        ops.linear(randn(3, 48, dtype=torch.bfloat16), w)
    with pytest.raises(ValueError, match="contiguous rows"):
        ops.linear(randn(48, 3).T, w)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 8, 64, 100])
def test_norms_and_add(ops: NativeOps, dtype: Any, width: int) -> None:
    x, y, w = randn(7, width, dtype=dtype), randn(7, width, seed=1, dtype=dtype), weight(randn(width, seed=2))

    def norm(v: Any) -> Any:
        return v / np.sqrt((v * v).mean(-1, keepdims=True) + 1e-5) * f64(w.data)

    close(ops.rms_norm(x, w, 1e-5), norm(f64(x)), dtype, 8)
    total = (f64(x) + f64(y)).astype(np.float32)
    close(ops.add(x, y), total, dtype)
    normed, kept = ops.add_rms_norm(x, y, w, 1e-5)
    assert torch.equal(kept, ops.add(y, x))
    assert torch.equal(normed, ops.rms_norm(kept, w, 1e-5))
    heads = randn(4, 6 * width, seed=3, dtype=dtype)[:, width : 3 * width].unflatten(1, (2, width))
    close(ops.rms_norm(heads, w, 1e-5), norm(f64(heads)), dtype, 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [16, 48, 64])
def test_rope_on_views(ops: NativeOps, dtype: Any, dim: int) -> None:
    x, table = randn(5, 9 * dim, dtype=dtype), randn(40, dim, seed=1)
    positions = [3, 0, 39, 7, 8]
    q, k = x[:, : 4 * dim].unflatten(1, (4, dim)), x[:, 4 * dim : 6 * dim].unflatten(1, (2, dim))
    got = ops.rope(q, k, weight(table, "rope"), batch([0] * 5, positions, [0, 5]))
    cos, sin = np.split(f64(table)[positions][:, None], 2, -1)
    for y, z in zip((q, k), got, strict=True):
        a, b = np.split(f64(y), 2, -1)
        close(z, np.concatenate([a * cos - b * sin, b * cos + a * sin], -1), dtype, 4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_picked(ops: NativeOps, dtype: Any) -> None:
    table = randn(50, 37, dtype=dtype)
    m = batch([4, 49, 0, 4, 7], [0] * 5, [0, 2, 5])
    x = ops.embed(weight(table, "embed"), m)
    assert torch.equal(x, table[[4, 49, 0, 4, 7]])
    assert torch.equal(ops.last(x, m), x[[1, 4]])
    q, k, v = ops.qkv(x, pack_linear(randn(64, 37, dtype=dtype)), Heads(2, 1, 16))
    whole = torch.cat([q.flatten(1), k.flatten(1), v.flatten(1)], 1)
    assert torch.equal(whole, ops.linear(x, pack_linear(randn(64, 37, dtype=dtype))))


def test_tokens_come_from_the_previous_step(ops: NativeOps) -> None:
    z = np.zeros(3, np.int32)
    host = HostBatch(z + 5, z, z, np.array([0, 3], np.int32), z[:1] + 3, np.zeros((1, 1), np.int32), z[:1] + 2,
                     np.array([1, -1, 0], np.int32))  # fmt: skip
    table = randn(50, 8)
    x = ops.embed(weight(table, "embed"), NativeMeta(host, torch.tensor([9, 11], dtype=torch.int32)))
    assert torch.equal(x, table[[11, 5, 9]])


def test_argmax_takes_the_lowest(ops: NativeOps) -> None:
    x = randn(4, 1003)
    x[1, [700, 20, 1002]] = 9.0
    x[2, 1002] = 9.0
    x[3] = -float("inf")
    assert np.array_equal(ops.argmax(x).numpy(), np.argmax(x.numpy(), 1))
