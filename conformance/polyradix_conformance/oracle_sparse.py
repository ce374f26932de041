"""Which rows `attend_sparse` must see, in plain NumPy. Imports no backend. See oracle.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyradix_conformance import oracle
from polyradix_conformance.oracle import Arr, Precision


@dataclass(frozen=True)
class Indexer:
    """The fields of the contract's IndexSpec."""

    heads: int = 3
    dim: int = 32
    top_k: int = 12
    eps: float = 2.0**-80  # too small to be seen beside a variance, even in float64


@dataclass(frozen=True)
class Inputs:
    """Of the tokens of one sequence: q [T,heads*dim], k [T,dim], weights [T,heads]; norm and bias [dim]."""

    q: Arr
    k: Arr
    weights: Arr
    norm: Arr
    bias: Arr


def keys(p: Precision, x: Inputs, table: Arr, rope: int, s: Indexer) -> Arr:
    """[T,dim], as the cache holds them; row t is at position t."""
    k, norm, bias = p.take(x.k, x.norm, x.bias)
    off = k - (p.total(k) / p.wide(s.dim))[:, None]
    variance = p.total(off * off) / p.wide(s.dim)
    return _turned(p, p.round(off / np.sqrt(variance + p.wide(s.eps))[:, None] * norm + bias)[:, None], table, rope)[
        :, 0
    ]


def selected(p: Precision, x: Inputs, table: Arr, rope: int, s: Indexer) -> Arr:
    """Whether each query sees each position, [T,T]."""
    key = keys(p, x, table, rope, s)
    q = _turned(p, x.q.reshape(-1, s.heads, s.dim), table, rope)
    each = np.maximum(p.product(q.swapaxes(0, 1), key), 0)  # [heads,T,T]
    score = p.total(x.weights[:, None] * np.moveaxis(each, 0, -1))
    out = np.zeros(score.shape, bool)
    for t, row in enumerate(score):
        out[t, np.argsort(-row[: t + 1], kind="stable")[: s.top_k]] = True
    return out


def _turned(p: Precision, x: Arr, table: Arr, rope: int) -> Arr:
    """x [T,heads,dim], of which the first `rope` columns turn."""
    turned = oracle.rope(p, x[..., :rope], table, np.arange(len(x)))
    return np.concatenate([turned, x[..., rope:]], axis=2)
