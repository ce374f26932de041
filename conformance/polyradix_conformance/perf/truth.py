"""The oracle at serving shapes: the sums of `oracle` in the same order, of a few rows, arranged to be quick."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from polyradix_conformance.oracle import EXACT, Arr, Precision, SampleRow, gumbel

Formula = Callable[[Precision], Arr]  # a result at a precision

BLOCK = 4096  # columns of the output at a time, to bound memory
EDGE = 1e-5  # as in oracle.sample: rounding may move a token over the edge of top_p or min_p


def linear(p: Precision, x: Arr, w: Arr, final: bool = False) -> Arr:
    """oracle.linear bit for bit, but for EXACT, where float64 sums in any order will do."""
    (x,) = p.take(x)
    product = np.matmul if p is EXACT else _sequential
    steps = range(0, len(w), BLOCK)
    out = np.concatenate(
        [product(x[:, :: p.order], np.ascontiguousarray(w[i : i + BLOCK, :: p.order].T, p.wide)) for i in steps], axis=1
    )
    return out if final else p.round(out)


def _sequential(x: Arr, w: Arr) -> Arr:
    """x [T,K] times w [K,N], one term after the other."""
    out: Arr = x[:, :1] * w[0]
    for k in range(1, len(w)):
        out += x[:, k : k + 1] * w[k]
    return out


def attend(p: Precision, q: Arr, k: Arr, v: Arr, scale: float) -> Arr:
    """The last row of oracle.attend: q [Hq,D], k and v [L,Hk,D]."""
    q, k, v = p.take(q, k, v)
    out = np.empty_like(q)
    for h in range(len(q)):
        kv_head = h * k.shape[1] // len(q)
        score = p.total(q[h] * k[:, kv_head]) * p.wide(scale)
        e = np.exp(score - score.max())
        out[h] = p.total((p.round(e)[:, None].astype(p.wide) * v[:, kv_head]).T) / p.total(e)
    return p.round(out)


def rope(p: Precision, x: Arr, table: Arr) -> Arr:
    """oracle.rope of x [T,heads,D], whose row t has row t of the table [.,D]."""
    x, table = p.take(x, table[: len(x), None])
    (a, b), (cos, sin) = np.split(x, 2, axis=-1), np.split(table, 2, axis=-1)
    return p.round(np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1))


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
