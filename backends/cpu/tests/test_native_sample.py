"""The native sampler against the definition in backend/sampling.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from polyradix.backend.batch import SampleBatch
from polyradix.backend.sampling import sample_host
from polyradix_cpu.native import NativeOps, load

VOCAB = 3001
ROWS = [  # temperature, top_k, top_p, min_p
    (0.0, 5, 0.5, 0.1), (1.0, 0, 1.0, 0.0), (0.7, 1, 1.0, 0.0), (1.3, 20, 1.0, 0.0),
    (1.0, 0, 0.8, 0.0), (3.0, 0, 0.97, 0.0), (1.0, 0, 1.0, 0.05), (0.9, 40, 0.9, 0.01),
    (2.0, 9000, 1.0, 0.0), (1.0, 0, 1e-6, 0.0), (1.0, 0, 1.0, 1.0),
]  # fmt: skip


@pytest.fixture(scope="module")
def ops() -> NativeOps:
    library = load()
    assert library is not None, "no native library: build it with `pip install -e backends/cpu`"
    return NativeOps(library, threads=2)


def batch(rng: np.random.Generator, masked: bool) -> SampleBatch:
    t, k, p, m = (np.array(x) for x in zip(*ROWS, strict=True))
    n = len(ROWS)
    mask: Any = rng.integers(-(2**31), 2**31, (n, (VOCAB + 31) // 32)).astype(np.int32) if masked else None
    seed, position = rng.integers(-(2**31), 2**31, n).astype(np.int32), rng.integers(0, 9999, n).astype(np.int32)
    f32 = np.float32
    return SampleBatch(t.astype(f32), k.astype(np.int32), p.astype(f32), m.astype(f32), seed, position, mask)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("spread", [0.3, 2.0, 6.0])
def test_same_tokens_as_the_definition(ops: NativeOps, masked: bool, spread: float) -> None:
    rng = np.random.default_rng(int(spread * 10) + masked)
    for _ in range(8):
        logits = (rng.normal(size=(len(ROWS), VOCAB)) * spread).astype(np.float32)
        logits = np.round(logits, 1) if spread > 1 else logits  # ties, in rank and at the top
        b = batch(rng, masked)
        assert np.array_equal(ops.sample(torch.from_numpy(logits), b).numpy(), sample_host(logits, b))


def test_an_empty_mask_is_an_error(ops: NativeOps) -> None:
    b = batch(np.random.default_rng(0), True)
    assert b.mask is not None
    b.mask[3] = 0
    with pytest.raises(ValueError, match="allows no token"):
        ops.sample(torch.zeros(len(ROWS), VOCAB), b)
