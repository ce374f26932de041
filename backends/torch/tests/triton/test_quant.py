"""Quantised products against NumPy float64, interpreted, with float8 and without; and blocks that do not fit."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from interpreted_backend import Interpreted

from polyradix.backend.protocol import ParamSpec, Quant
from polyradix_torch.ops import Linear
from polyradix_torch.quant import Codes
from polyradix_torch.triton import eight, quant

pytestmark = pytest.mark.usefixtures("exact")


@pytest.mark.parametrize("native", [True, False])
def test_every_code_of_float8(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """Each alone in a row, in a block of its own scale."""
    monkeypatch.setattr(eight, "_native", lambda device: native)
    numbers = np.array([c for c in range(256) if c & 127 != 127], np.uint8)
    scale = np.random.default_rng(0).uniform(0.5, 2, (254, 1)).astype(np.float32)
    bits = np.zeros((254, 32), np.uint8)
    bits[np.arange(254), np.arange(254) % 32] = numbers
    codes = torch.from_numpy(bits).view(torch.float8_e4m3fn)
    got = quant.product(torch.ones(3, 32), Codes(Quant("fp8", (1, 32)), codes, torch.from_numpy(scale), None))
    want = numbers.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale[:, 0]
    np.testing.assert_allclose(got.numpy(), np.tile(want, (3, 1)), rtol=1e-7)


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_blocks_that_the_kernel_has_not_are_packed_dense(kind: Any) -> None:
    shape = (16, 24) if kind == "linear" else (2, 16, 24)
    random, at = np.random.default_rng(1), (*shape[:-1], 2)
    parts: dict[str, Any] = {
        "weight": random.integers(0, 256, (*shape[:-1], 12)).astype(np.uint8),
        "scale": np.full(at, 0.5, np.float32),
        "zero": np.full(at, 3, np.uint8),
    }
    spec = ParamSpec("w", kind, shape, "float32", quant=Quant("int4", (1, 12)))
    packed = Interpreted(1).pack(spec, lambda part="weight": parts[part])
    assert isinstance(packed, Linear if kind == "linear" else torch.Tensor)
    nibbles = np.stack([parts["weight"] & 15, parts["weight"] >> 4], -1).reshape(shape).astype(np.float64)
    np.testing.assert_array_equal((packed.weight if kind == "linear" else packed).numpy(), (nibbles - 3) * 0.5)
