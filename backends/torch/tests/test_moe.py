"""Mixture of experts in torch against NumPy float64, one token at a time, and a token's bits alone and in a batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyradix.backend.protocol import HOST_DTYPES, MoeSpec, MoeWeights, ParamSpec
from polyradix_torch import to_torch
from polyradix_torch.moe import route

E, H, F = 12, 32, 48
SPECS = {
    "softmax": MoeSpec(E, 3),
    "plain": MoeSpec(E, 2, renormalise=False, scale=0.5),
    "sigmoid": MoeSpec(E, 4, "sigmoid", True, 2.5, groups=4, top_groups=2, group_best=2),
}


def pack(backend, host, dtype, bias):
    def one(name, kind, dtype):
        spec = ParamSpec(name, kind, host[name].shape, dtype, bias=bias and kind == "router")
        parts = {"weight": host[name].astype(HOST_DTYPES[dtype]), "bias": host["bias"].astype(np.float32)}
        return backend.pack(spec, lambda part="weight": parts[part])

    return MoeWeights(
        one("router", "router", "float32"), one("gate_up", "experts", dtype), one("down", "experts", dtype)
    )


@pytest.fixture
def host(rng):
    shapes = {"router": (E, H), "gate_up": (E, 2 * F, H), "down": (E, H, F), "bias": (E,), "x": (37, H)}
    scaled = {n: rng.standard_normal(s) / (s[-1] ** 0.5 if n in ("gate_up", "down") else 1) for n, s in shapes.items()}
    return {n: x.astype(HOST_DTYPES["bfloat16"]).astype(np.float64) for n, x in scaled.items()}


def by_hand(x, host, bias, s):
    z = host["router"] @ x
    score = np.exp(z) / np.exp(z).sum() if s.scoring == "softmax" else 1 / (1 + np.exp(-z))
    choice = score + host["bias"] * bias
    sums = np.sort(choice.reshape(s.groups, -1), axis=1)[:, -s.group_best :].sum(axis=1)
    kept = np.argsort(-sums)[: s.top_groups]
    ids = sorted((e for e in range(E) if e // (E // s.groups) in kept), key=lambda e: -choice[e])[: s.top_k]
    out = np.zeros(H)
    for e in ids:
        gate, up = np.split(host["gate_up"][e] @ x, 2)
        weight = score[e] / (score[ids].sum() if s.renormalise else 1) * s.scale
        out += weight * (host["down"][e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-5), ("bfloat16", 5e-2)])
@pytest.mark.parametrize("name", SPECS)
def test_against_one_token_at_a_time(backend, host, name, dtype, bound, bias):
    packed = pack(backend, host, dtype, bias)
    x = to_torch(host["x"].astype(HOST_DTYPES[dtype]))
    got = backend.ops.moe(x, packed, SPECS[name])
    assert got.dtype == x.dtype
    expected = np.array([by_hand(row, host, bias, SPECS[name]) for row in host["x"]])
    assert np.abs(got.double().numpy() - expected).max() < bound


@pytest.mark.parametrize("name", SPECS)
def test_routes_and_sums_do_not_depend_on_the_batch(host, name):
    logits = torch.randn(700, 60)
    s = MoeSpec(60, 4, SPECS[name].scoring)
    ids, weights = route(logits, None, s)
    for n in (1, 3, 64, 599):
        for part in (slice(0, n), slice(700 - n, 700)):
            some_ids, some = route(logits[part], None, s)
            assert torch.equal(some_ids, ids[part])
            assert torch.equal(some, weights[part])


def test_of_equal_values_the_lower_id_wins():
    logits = torch.zeros(5, 300)
    assert route(logits, None, MoeSpec(300, 4))[0].tolist() == [[0, 1, 2, 3]] * 5
    grouped = MoeSpec(300, 4, groups=100, top_groups=3, group_best=3)
    assert route(logits, None, grouped)[0].tolist() == [[0, 1, 2, 3]] * 5
