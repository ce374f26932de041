"""The defined noise: finite for every hash, and distributed as Gumbel noise is."""

from __future__ import annotations

import numpy as np

from polyradix.backend.sampling import gumbel


def test_noise_is_finite_at_the_ends_of_the_hash() -> None:
    noise = np.concatenate([gumbel(seed, 7, np.arange(1 << 20)) for seed in range(32)])
    assert np.isfinite(noise).all()


def test_noise_has_the_mean_and_spread_of_a_gumbel() -> None:
    noise = gumbel(3, 11, np.arange(1 << 20)).astype(np.float64)
    assert abs(noise.mean() - np.euler_gamma) < 5e-3
    assert abs(noise.var() - np.pi**2 / 6) < 1e-2
