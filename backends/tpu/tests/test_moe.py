"""Routes against NumPy, one token at a time, conformance cases, and what experts say to other ranks."""

from __future__ import annotations

import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from polyradix.backend.protocol import MoeSpec, MoeWeights, ParamSpec
from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import run_case
from polyradix_tpu import entry
from polyradix_tpu.mesh import AXIS, make_mesh, partition
from polyradix_tpu.moe import route

CASES = [c for c in all_cases() if re.match(r"L1/moe/(groups/bias|ties|width)/|L5/moe/tp-4/", c.id)]
GROUPED = MoeSpec(12, 4, "sigmoid", True, 2.5, groups=4, top_groups=2, group_best=2)


def by_hand(z, bias, s):
    score = np.exp(z) / np.exp(z).sum() if s.scoring == "softmax" else 1 / (1 + np.exp(-z))
    choice = score + bias
    size = s.experts // s.groups
    best = np.sort(choice.reshape(s.groups, size), axis=1)[:, -s.group_best :].sum(axis=1)
    kept = np.argsort(-best)[: s.top_groups]
    ids = sorted((e for e in range(s.experts) if e // size in kept), key=lambda e: -choice[e])[: s.top_k]
    return ids, score[ids] / (score[ids].sum() if s.renormalise else 1) * s.scale


@pytest.mark.parametrize(
    "s", [GROUPED, MoeSpec(12, 3), MoeSpec(12, 2, renormalise=False), replace(GROUPED, scoring="softmax", group_best=1)]
)
def test_routes(s):
    rng = np.random.default_rng(1)
    z, bias = rng.standard_normal((40, 12)).astype(np.float32), rng.standard_normal(12).astype(np.float32) - 3
    ids, weights = route(z, bias, s)
    for row, got, weight in zip(z.astype(float), np.asarray(ids), np.asarray(weights), strict=True):
        wanted, values = by_hand(row, bias, s)
        assert got.tolist() == wanted
        np.testing.assert_allclose(weight, values, rtol=1e-5)


def test_of_equal_values_the_lower_id_wins():
    z = np.zeros((3, 300), np.float32)
    for s in (MoeSpec(300, 4), MoeSpec(300, 4, groups=100, top_groups=3, group_best=3)):
        assert np.asarray(route(z, None, s)[0]).tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("tp", [1, 4])
def test_one_sum_whatever_the_ranks(tp):
    backend, rng = entry.create(tp=tp, platform="cpu"), np.random.default_rng(2)

    def pack(kind, *shape):
        value = rng.standard_normal(shape, np.float32)
        return backend.pack(ParamSpec(kind, kind, shape, "float32", shard_axis=0 if kind == "experts" else None),
                            lambda part="weight": value)  # fmt: skip

    tree = [pack("router", 12, 32), pack("experts", 12, 48, 32), pack("experts", 12, 32, 24)]
    local = jax.shard_map(
        lambda x, w: backend.ops.moe(x, MoeWeights(*w), GROUPED), mesh=make_mesh(jax.devices(), tp),
        in_specs=(PartitionSpec(), [partition(w) for w in tree]), out_specs=PartitionSpec(), check_vma=False,
    )  # fmt: skip
    assert tree[1].value.sharding.spec == PartitionSpec(AXIS)
    text = jax.jit(local).lower(np.ones((5, 32), np.float32), tree).compile().as_text()
    said = re.findall(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", text)
    assert said == ["all-reduce"] * (tp > 1)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_case(case):
    result = run_case(case, lambda tp: entry.create(tp=tp, platform="cpu"))
    assert result.status == "pass", result.detail
