"""The oracle's arrays against plain loops over numbers: the same bits, but for EXACT, whose sums have no order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from polyradix_conformance.oracle import EXACT, Arr, Attention, Precision, attend, emulated, rounded
from polyradix_conformance.oracle_mla import Latent, Weights, cached
from polyradix_conformance.oracle_mla import attend as attend_latent

PRECISIONS = [("float32", EXACT), *((dtype, p) for dtype in ("float32", "bfloat16") for p in emulated(dtype))]
R = np.random.default_rng(0)


def summed(p: Precision, terms: Any) -> Any:
    """One number after the other."""
    total = p.wide(0)
    for term in list(terms)[:: p.order or 1]:
        total = total + p.wide(term)
    return total


def check(p: Precision, got: Arr, want: Any) -> None:
    np.testing.assert_allclose(got, want, rtol=0 if p.order else 1e-12, atol=0 if p.order else 1e-14)


@pytest.mark.parametrize(("dtype", "p"), PRECISIONS)
def test_sums(dtype: str, p: Precision) -> None:
    x, w = p.take(rounded(R.normal(size=(3, 50)), dtype), rounded(R.normal(size=(2, 1, 4, 50)), dtype))
    check(p, p.total(x), [summed(p, row) for row in x])
    check(p, p.product(x, w), [[[[summed(p, a * b) for b in rows] for a in x] for rows in outer] for outer in w])


@pytest.mark.parametrize("spec", [Attention(0.2), Attention(0.25, 4, 1.5, (0.5, 3.0, -20.0, 12.0))])
@pytest.mark.parametrize(("dtype", "p"), PRECISIONS)
def test_attention(dtype: str, p: Precision, spec: Attention) -> None:
    q, k, v = p.take(*(rounded(R.normal(size=(n, heads, 16)), dtype) for n, heads in ((6, 4), (9, 2), (9, 2))))
    want = np.empty_like(q)
    for row, head in np.ndindex(6, 4):
        last = row + 3
        seen = range(0 if spec.window is None else max(0, last - spec.window + 1), last + 1)
        score = np.array([summed(p, q[row, head] * k[t, head // 2]) for t in seen]) * p.wide(spec.scale)
        score = score if spec.softcap is None else p.wide(spec.softcap) * np.tanh(score / p.wide(spec.softcap))
        sink = p.wide(spec.sinks[head] if spec.sinks else -np.inf)
        top = max(score.max(), sink)
        e = np.exp(score - top)
        weights = p.round(e).astype(p.wide)
        values = [summed(p, weights * v[seen, head // 2, i]) for i in range(16)]
        want[row, head] = np.array(values) / (summed(p, e) + np.exp(sink - top))
    check(p, attend(p, q, k, v, spec), p.round(want))


@pytest.mark.parametrize("absorbed", [False, True])
def test_latent_attention_is_attention_over_expanded_keys(absorbed: bool) -> None:
    """And a query that sees the last two positions has a window of two."""
    a = Latent(nope=16, v=32)  # keys are as wide as values
    w = Weights(R.normal(size=a.rank), R.normal(size=(a.heads, 48, a.rank)) / 8, R.normal(size=(9, a.rope)))
    w.table[:] = [1.0] * 8 + [0.0] * 8  # no turns
    q, c = R.normal(size=(6, a.heads * 32)), R.normal(size=(9, a.rank + a.rope))
    held = cached(EXACT, c, w, a)
    made = np.einsum("tr,hor->tho", held[:, : a.rank], w.up)
    turned = np.repeat(held[:, None, a.rank :], a.heads, axis=1)
    k = np.concatenate([made[..., : a.nope], turned], axis=2)
    ago = np.arange(3, 9)[:, None] - np.arange(9)
    for window, seen in ((None, None), (2, (ago >= 0) & (ago < 2))):
        want = attend(EXACT, q.reshape(6, a.heads, 32), k, made[..., a.nope :], Attention(a.scale, window))
        np.testing.assert_allclose(attend_latent(EXACT, q, c, w, a, absorbed, seen), want, rtol=1e-10, atol=1e-12)
