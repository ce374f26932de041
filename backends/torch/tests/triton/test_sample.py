"""Sampling on the device against its definition on the host, on random grids of parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyradix.backend import sampling
from polyradix.backend.batch import SampleBatch
from polyradix_conformance import oracle
from polyradix_torch.sample import gumbel, sample
from polyradix_torch.triton.rows import LANES, argmax

pytestmark = pytest.mark.usefixtures("exact")
ROWS = 48


def random_batch(r: np.random.Generator, vocab: int, masked: bool) -> SampleBatch:
    bits = r.random((ROWS, -(-vocab // 32) * 32)) < r.choice([0.02, 0.5, 1.0], (ROWS, 1))
    bits[:, 1] = True  # nothing allowed has no answer
    mask = np.packbits(bits, axis=1, bitorder="little").view(np.int32) if masked else None
    return SampleBatch(
        temperature=r.choice([0.0, 0.1, 0.7, 1.0, 5.0], ROWS).astype(np.float32),
        top_k=r.choice([0, 1, 2, 40, 10**6], ROWS).astype(np.int32),
        top_p=r.choice([1.0, 0.9, 0.5, 1e-6], ROWS).astype(np.float32),
        min_p=r.choice([0.0, 0.05, 0.5, 1.0], ROWS).astype(np.float32),
        seed=r.integers(-(2**31), 2**31, ROWS).astype(np.int32),
        position=r.integers(0, 2**20, ROWS).astype(np.int32),
        mask=mask,
    )


def oracle_row(batch: SampleBatch, s: int, vocab: int) -> oracle.SampleRow:
    allowed = None
    if batch.mask is not None:
        bits = np.unpackbits(batch.mask[s].view(np.uint8), bitorder="little")[:vocab]
        allowed = tuple(np.flatnonzero(bits).tolist())
    number = (float(batch.temperature[s]), int(batch.top_k[s]), float(batch.top_p[s]), float(batch.min_p[s]))
    return oracle.SampleRow(*number, int(batch.seed[s]), int(batch.position[s]), allowed)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("vocab", [33, 500, 2 * LANES + 7])
def test_grid(vocab: int, tied: bool, masked: bool) -> None:
    """The host's token, or one that differs from it by rounding alone, which is rare. Ties are many: few values."""
    r = np.random.default_rng([vocab, tied, masked])
    x = (r.normal(size=(ROWS, vocab)) * 3).astype(np.float32)
    x = np.round(x) if tied else x
    batch = random_batch(r, vocab, masked)
    got, want = sample(torch.from_numpy(x), batch, argmax).numpy(), sampling.sample_host(x, batch)
    differ = np.flatnonzero(got != want)
    for s in differ:
        assert got[s] in oracle.sample(x[s], oracle_row(batch, s, vocab)), f"row {s}: {oracle_row(batch, s, vocab)}"
    assert len(differ) <= 1


def test_equal_logits_rank_by_id() -> None:
    """Of equal logits top_k keeps the first, and greedy takes the first that the mask allows."""
    batch = SampleBatch(
        temperature=np.ones(ROWS, np.float32),
        top_k=np.full(ROWS, 3, np.int32),
        top_p=np.ones(ROWS, np.float32),
        min_p=np.zeros(ROWS, np.float32),
        seed=np.arange(ROWS, dtype=np.int32),
        position=np.zeros(ROWS, np.int32),
    )
    x = torch.zeros(ROWS, 2 * LANES)
    assert set(sample(x, batch, argmax).tolist()) == {0, 1, 2}
    mask = np.zeros((ROWS, 2 * LANES // 32), np.int32)
    mask[:, 40:42] = -(2**31)  # the last bit
    greedy = SampleBatch(
        *(np.zeros(ROWS, t) for t in (np.float32, np.int32, np.float32, np.float32, np.int32, np.int32)), mask=mask
    )
    assert sample(x, greedy, argmax).tolist() == [40 * 32 + 31] * ROWS


def test_noise_is_the_hosts() -> None:
    """Over the whole range of seeds and positions, to the last bits of a logarithm."""
    pairs = [(0, 0), (-1, 5), (2**31 - 1, 2**20), (-(2**31), 2**31 - 1), (12345, 1)]
    seed, position = torch.tensor(pairs, dtype=torch.int32).T
    want = np.stack([sampling.gumbel(s, p, np.arange(5000)) for s, p in pairs])
    np.testing.assert_allclose(gumbel(seed, position, 5000).numpy(), want, rtol=1e-5, atol=1e-6)
