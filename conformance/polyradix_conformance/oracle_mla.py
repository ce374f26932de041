"""What `attend_latent` must compute, in both of its forms, in plain NumPy. Imports no backend. See oracle.py."""

from __future__ import annotations

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


def attend(p: Precision, q: Arr, c: Arr, w: Weights, a: Latent, absorbed: bool, seen: Arr | None = None) -> Arr:
    """Causal attention of one sequence: q [T,H*(nope+rope)], the last T of L, and c as above -> [T,H,v]. `seen` [T,L]:
    which positions each query sees, None for all up to its own."""
    places, split = np.arange(len(c) - len(q), len(c)), q.reshape(len(q), a.heads, a.nope + a.rope)
    turned, held = oracle.rope(p, split[..., a.nope :], w.table, places), cached(p, c, w, a)
    nope, turned, held, up = p.take(split[..., : a.nope], turned, held, w.up)
    asked, (rows, angles) = nope.swapaxes(0, 1), np.split(held, [a.rank], axis=1)
    if absorbed:
        asked = p.round(p.product(asked, up[:, : a.nope].swapaxes(1, 2))).astype(p.wide)
        keys = values = rows
    else:
        keys, values = np.split(p.round(p.product(rows, up)).astype(p.wide), [a.nope], axis=2)
    scale = a.scale * (1 + a.attn_scale * np.log(1 + places // a.floor_scale))
    score = (p.product(asked, keys) + p.product(turned.swapaxes(0, 1), angles)) * scale[:, None].astype(p.wide)
    causal = places[:, None] >= np.arange(len(c))
    out = oracle.softmax_mean(p, score, causal if seen is None else seen, values)
    if absorbed:
        out = p.product(p.round(out).astype(p.wide), up[:, a.nope :])
    return p.round(out.swapaxes(0, 1))
