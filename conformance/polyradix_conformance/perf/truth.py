"""The oracle at serving shapes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from polyradix_conformance import oracle
from polyradix_conformance.oracle import Arr, Precision, SampleRow, gumbel

Formula = Callable[[Precision], Arr]  # a result at a precision

BLOCK = 4096  # columns of the output at a time, to bound memory
EDGE = 1e-5  # as in oracle.sample: rounding may move a token over the edge of top_p or min_p


def linear(p: Precision, x: Arr, w: Arr, final: bool = False) -> Arr:
    """oracle.linear, a block of columns at a time."""
    parts = [oracle.linear(p, x, w[i : i + BLOCK], final=final) for i in range(0, len(w), BLOCK)]
    return np.concatenate(parts, axis=1)


def attend(p: Precision, q: Arr, k: Arr, v: Arr, scale: float) -> Arr:
    """The last row of oracle.attend: q [Hq,D], k and v [L,Hk,D]."""
    out: Arr = oracle.attend(p, q[None], k, v, oracle.Attention(scale))[0]
    return out


def sample(x: Arr, r: SampleRow) -> set[int]:
    """oracle.sample without a mask, for a vocabulary x [V] of any size."""
    if r.temperature == 0:
        return {int(np.argmax(x))}
    ids = np.argsort(-x, kind="stable")[: r.top_k or None]
    z = x[ids].astype(np.float64) / r.temperature
    weight = np.exp(z - z[0])
    p = weight / weight.sum()
    before = np.cumsum(p) - p
    out: set[int] = set()
    for slack in (-EDGE, 0.0, EDGE):
        stays = ((r.top_p == 1) | (before < r.top_p + slack)) & ((r.min_p == 0) | (p >= (r.min_p - slack) * p[0]))
        stays[0] = True
        score = z[stays] + [gumbel(r.seed, r.position, int(i)) for i in ids[stays]]
        out |= {int(i) for i in ids[stays][score >= score.max() - EDGE]}
    return out
