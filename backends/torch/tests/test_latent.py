"""Latent attention in torch, in both forms, against keys and values made in NumPy float64, one query at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from polyradix.backend.protocol import HOST_DTYPES, KVSpec, LatentSpec, LatentWeights, ParamSpec
from polyradix_torch import TorchOps, to_torch
from polyradix_torch.latent import expanding_pays, per_head

SPEC = LatentSpec(heads=3, rank=32, nope=16, rope=8, v=20, scale=0.25, eps=1e-6)
SPECS = {"plain": SPEC, "tempered": replace(SPEC, attn_scale=0.5, floor_scale=3)}
PAGE = 4


def by_hand(q, c, host, a):
    """One sequence: q [n,H*(nope+rope)] and c [n,R+rope] -> [n,H*v]."""
    angles = np.arange(len(c))[:, None] * host["freq"]
    cos, sin = np.cos(angles), np.sin(angles)

    def turn(x, t):
        first, second = np.split(x, 2)
        return np.concatenate([first * cos[t] - second * sin[t], second * cos[t] + first * sin[t]])

    latent = c[:, : a.rank] / np.sqrt((c[:, : a.rank] ** 2).mean(1, keepdims=True) + a.eps) * host["norm"]
    key = np.array([turn(c[t, a.rank :], t) for t in range(len(c))])
    out = np.zeros((len(q), a.heads, a.v))
    for t, row in enumerate(q.reshape(len(q), a.heads, -1)):
        for h in range(a.heads):
            k = np.hstack([latent[: t + 1] @ host["up"][h, : a.nope].T, key[: t + 1]])
            score = k @ np.concatenate([row[h, : a.nope], turn(row[h, a.nope :], t)]) * a.scale
            score = score * (1 + a.attn_scale * math.log(1 + t // a.floor_scale))
            p = np.exp(score - score.max())
            out[t, h] = p / p.sum() @ (latent[: t + 1] @ host["up"][h, a.nope :].T)
    return out.reshape(len(q), -1)


@pytest.fixture
def host(rng):
    a, n = SPEC, 40
    shapes = {"q": (n, a.heads * (a.nope + a.rope)), "c": (n, a.rank + a.rope), "up": (a.heads, a.nope + a.v, a.rank)}
    out = {name: rng.standard_normal(shape) for name, shape in shapes.items()} | {"norm": 1 + rng.random(a.rank)}
    out["up"] /= a.rank**0.5
    out = {n: x.astype(HOST_DTYPES["bfloat16"]).astype(np.float64) for n, x in out.items()}
    return out | {"freq": 100.0 ** -np.linspace(0, 1, a.rope // 2)}


def packed(backend, host, dtype):
    angles = np.arange(64)[:, None] * host["freq"]
    host = host | {"table": np.hstack([np.cos(angles), np.sin(angles)])}

    def one(name, kind, dtype):
        return backend.pack(
            ParamSpec(name, kind, host[name].shape, dtype), lambda: host[name].astype(HOST_DTYPES[dtype])
        )

    return LatentWeights(one("norm", "norm", dtype), one("up", "latent_up", dtype), one("table", "rope", "float32"))


@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-5), ("bfloat16", 6e-2)])
@pytest.mark.parametrize("name", SPECS)
def test_against_one_query_at_a_time(backend, batch_of, host, name, dtype, bound, invariant):
    a, ops = SPECS[name], TorchOps(invariant=invariant)
    spec = KVSpec(1, 1, a.rank + a.rope, PAGE, dtype, "latent")
    (kv,), w = backend.alloc_kv(spec, 20), packed(backend, host, dtype)
    pages = list(range(19, 8, -1))
    for done, n in ((0, 25), (25, 1), (26, 14)):
        meta = backend.prepare(batch_of([(done, n, pages)], PAGE))
        q, c = (to_torch(host[x][done : done + n].astype(HOST_DTYPES[dtype])) for x in "qc")
        got, kv = ops.attend_latent(q, c, kv, meta, w, a)
        assert got.dtype == q.dtype
        want = by_hand(host["q"], host["c"], host, a)[done : done + n]
        assert np.abs(got.double().numpy() - want).max() < bound


def test_the_form_with_fewer_multiplications():
    big = LatentSpec(heads=16, rank=512, nope=128, rope=64, v=128, scale=1.0, eps=1e-6)
    assert not expanding_pays(1, 4096, big)
    assert expanding_pays(4096, 4096, big)
    few, many = 150, 200  # 512 * 256 / 768 = 171 queries where contexts are much longer than prompts
    assert (expanding_pays(few, 1 << 20, big), expanding_pays(many, 1 << 20, big)) == (False, True)


def test_products_per_head_do_not_depend_on_the_batch():
    x, w = torch.randn(100, 3, 24), torch.randn(3, 24, 40)
    whole = per_head(x, w)
    torch.testing.assert_close(whole, torch.einsum("nha,hab->nhb", x, w))
    for n in (1, 2, 7, 8, 9, 63):
        assert torch.equal(per_head(x[:n], w), whole[:n])
        assert torch.equal(per_head(x[-n:], w), whole[-n:])
