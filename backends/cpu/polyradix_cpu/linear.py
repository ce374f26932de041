"""Linears on upstream torch for CPUs: oneDNN's packed weights, and a row's bits independent of the batch.

oneDNN picks its code by shape, so a row may round differently in a batch of 1 and of 64. On the processors seen so far
it does not, but nothing promises it. So batches run as powers of two, padded with zeros and at most MOST rows, which
also spares oneDNN from preparing code for ever new shapes; and each weight shape is tried once on all of these sizes.
Where rows differ, that shape runs in blocks of BLOCK rows only: always the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

BLOCK = 16
MOST = 64  # more rows at a time are not faster


def native_bf16() -> bool:
    """True when this processor multiplies bfloat16 itself; if not, torch is up to 7 times slower than in float32."""
    cpu = torch.backends.cpu.get_cpu_capability()
    if cpu.startswith(("AVX", "DEFAULT", "NO AVX")):
        return bool(torch.cpu._is_avx512_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedLinear:
    """[T,in] -> [T,out] in `dtype`, bias included. Holds the weight packed, in `dtype`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._multiply = multiplier(weight.to(dtype), None if bias is None else bias.to(dtype))
        self.steady = _steady(tuple(weight.shape), dtype, bias is not None, torch.get_num_threads())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        return torch.cat([self._padded(part) for part in x.split(MOST if self.steady else BLOCK)])

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        rows = 1 << (len(x) - 1).bit_length() if self.steady else BLOCK
        return self._multiply(F.pad(x, (0, 0, 0, rows - len(x))))[: len(x)]


def multiplier(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """x -> x @ weight.T + bias by this torch's fastest kernels: oneDNN's packed weight, where there is oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, BLOCK)
    run = torch.ops.mkldnn._linear_pointwise
    return lambda x: run(x, packed, bias, "none", [], "")


@cache
def _steady(shape: tuple[int, ...], dtype: torch.dtype, bias: bool, threads: int) -> bool:
    """Whether rows have the same bits in every batch size that is a power of two, up to MOST."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random).to(dtype)
    multiply = multiplier(weight, weight[:, 0].contiguous() if bias else None)
    return rows_equal(multiply, torch.randn(MOST, shape[1], generator=random).to(dtype))


def rows_equal(multiply: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> bool:
    """True when multiply gives the first and the last 1, 2, 4... rows of x the same bits as it does among all of x."""
    whole = multiply(x)
    sizes = [1 << i for i in range((len(x) - 1).bit_length())]
    return all(
        torch.equal(multiply(x[part]), whole[part]) for n in sizes for part in (slice(n), slice(len(x) - n, None))
    )
