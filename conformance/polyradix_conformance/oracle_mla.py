"""What `attend_latent` must compute, in both of its forms, in plain loops. Imports no backend. See oracle.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from polyradix_conformance import oracle
from polyradix_conformance.oracle import Arr, Precision


@dataclass(frozen=True)
class Latent:
    """The fields of the contract's LatentSpec."""

    heads: int = 4
    rank: int = 64
    nope: int = 32
    rope: int = 16
    v: int = 48
    scale: float = 0.2
    eps: float = 1e-5
    attn_scale: float = 0.0
    floor_scale: int = 1


@dataclass(frozen=True)
class Weights:
    """norm [R], up [H,nope+v,R], table [positions,rope]."""

    norm: Arr
    up: Arr
    table: Arr


def cached(p: Precision, c: Arr, w: Weights, a: Latent) -> Arr:
    """The rows [L,R+rope] that the cache holds of c [L,R+rope], row t at position t."""
    normed = oracle.rms_norm(p, c[:, : a.rank], w.norm, a.eps)
    turned = oracle.rope(p, c[:, None, a.rank :], w.table, np.arange(len(c)))[:, 0]
    return np.concatenate([normed, turned], axis=1)


def attend(p: Precision, q: Arr, c: Arr, w: Weights, a: Latent, absorbed: bool, seen: list[Arr] | None = None) -> Arr:
    """Causal attention of one sequence: q [T,H*(nope+rope)], the last T of L, and c as above -> [T,H,v]. `seen`: the
    positions that each query sees, None for all up to its own."""
    places = range(len(c) - len(q), len(c))
    held, split = cached(p, c, w, a), q.reshape(len(q), a.heads, a.nope + a.rope)
    turned = oracle.rope(p, split[..., a.nope :], w.table, np.array(places))
    nope, turned, held, up = p.take(split[..., : a.nope], turned, held, w.up)
    seen = seen or [np.arange(place + 1) for place in places]
    out = np.empty((len(q), a.heads, a.v), p.wide)
    for h in range(a.heads):
        head = _absorbed if absorbed else _expanded
        out[:, h] = head(p, nope[:, h], turned[:, h], held, up[h], a, seen)
    return p.round(out)


def _expanded(p: Precision, nope: Arr, turned: Arr, held: Arr, up: Arr, a: Latent, seen: list[Arr]) -> Arr:
    made = p.round(_product(p, held[:, : a.rank], up)).astype(p.wide)
    keys, values = np.split(made, [a.nope], axis=1)
    out = np.empty((len(nope), a.v), p.wide)
    for t, at in enumerate(seen):
        place = len(held) - len(nope) + t
        e = _weights(p, p.total(nope[t] * keys[at]), turned[t], held[at], place, a)
        out[t] = _mean(p, e, values[at])
    return out


def _absorbed(p: Precision, nope: Arr, turned: Arr, held: Arr, up: Arr, a: Latent, seen: list[Arr]) -> Arr:
    asked = p.round(_product(p, nope, up[: a.nope].T)).astype(p.wide)
    means = np.empty((len(nope), a.rank), p.wide)
    for t, at in enumerate(seen):
        place, rows = len(held) - len(nope) + t, held[at]
        e = _weights(p, p.total(asked[t] * rows[:, : a.rank]), turned[t], rows, place, a)
        means[t] = _mean(p, e, rows[:, : a.rank])
    return _product(p, p.round(means).astype(p.wide), up[a.nope :])


def _weights(p: Precision, score: Arr, turned: Arr, rows: Arr, place: int, a: Latent) -> Arr:
    """Exponentials of the scores of the query at position `place`."""
    temperature = 1 + a.attn_scale * math.log(1 + place // a.floor_scale)
    score = (score + p.total(turned * rows[:, a.rank :])) * p.wide(a.scale * temperature)
    out: Arr = np.exp(score - score.max())
    return out


def _mean(p: Precision, e: Arr, rows: Arr) -> Arr:
    weighted = p.round(e)[:, None].astype(p.wide) * rows  # kernels may round the weights to the dtype
    out: Arr = p.total(weighted.T) / p.total(e)
    return out


def _product(p: Precision, x: Arr, w: Arr) -> Arr:
    """x [n,i], w [o,i] -> [n,o], unrounded."""
    out: Arr = np.array([p.total(row * w) for row in x])
    return out
