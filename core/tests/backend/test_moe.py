"""Mixture of experts in NumPy against one token at a time in Python's own numbers, and over ranks against one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.expand import Expansions
from polyradix.backend.numpy import entry
from polyradix.backend.numpy.moe import chosen
from polyradix.backend.protocol import MoeSpec, MoeWeights, ParamSpec

E, H, F = 8, 6, 4
GROUPED = MoeSpec(E, 3, "sigmoid", True, 2.5, groups=4, top_groups=2, group_best=2)
SPECS = {
    "mixtral": MoeSpec(E, 2),
    "plain": MoeSpec(E, 3, renormalise=False, scale=0.5),
    "all": MoeSpec(E, E),
    "one": MoeSpec(E, 1, "sigmoid", False),
    "deepseek-v3": GROUPED,
    "deepseek-v2": MoeSpec(E, 2, renormalise=False, scale=16.0, groups=2, top_groups=1),
}


def weights(backend: Any, bias: bool, shard: int | None = None) -> tuple[MoeWeights, dict[str, Any]]:
    r = np.random.default_rng(4)
    host = {
        "router": r.normal(size=(E, H)),
        "bias": r.normal(size=E) - 2,
        "gate_up": r.normal(size=(E, 2 * F, H)),
        "down": r.normal(size=(E, H, F)),
    }

    def pack(spec: ParamSpec) -> Any:
        return backend.pack(spec, lambda part="weight": host["bias" if part == "bias" else spec.name])

    packed = MoeWeights(
        pack(ParamSpec("router", "router", (E, H), "float32", bias=bias)),
        pack(ParamSpec("gate_up", "experts", (E, 2 * F, H), "float32", shard_axis=shard)),
        pack(ParamSpec("down", "experts", (E, H, F), "float32", shard_axis=shard)),
    )
    return packed, host


def by_hand(x: list[float], host: dict[str, Any], bias: bool, s: MoeSpec) -> Any:
    logits = [float(np.dot(row, x)) for row in host["router"]]
    score = [1 / (1 + math.exp(-z)) for z in logits]
    if s.scoring == "softmax":
        score = [math.exp(z) / sum(map(math.exp, logits)) for z in logits]
    choice = [a + b for a, b in zip(score, host["bias"], strict=True)] if bias else score
    size = E // s.groups
    groups = [choice[g * size : (g + 1) * size] for g in range(s.groups)]
    sums = [sum(sorted(g)[-s.group_best :]) for g in groups]
    kept = sorted(range(s.groups), key=lambda g: (-sums[g], g))[: s.top_groups]
    ids = sorted((e for e in range(E) if e // size in kept), key=lambda e: (-choice[e], e))[: s.top_k]
    total = sum(score[e] for e in ids) if s.renormalise else 1
    out = np.zeros(H)
    for e in ids:
        up = host["gate_up"][e] @ x
        inner = [g / (1 + math.exp(-g)) * u for g, u in zip(up[:F], up[F:], strict=True)]
        out += score[e] / total * s.scale * (host["down"][e] @ inner)
    return out


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_against_one_token_at_a_time(name: str, bias: bool) -> None:
    backend, x = entry.create(), np.random.default_rng(5).normal(size=(9, H))
    packed, host = weights(backend, bias)
    got = backend.ops.moe(x.astype(np.float32), packed, SPECS[name])
    np.testing.assert_allclose(got, [by_hand(row, host, bias, SPECS[name]) for row in x], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_ranks_hold_whole_experts(tp: int) -> None:
    one, mesh = entry.create(), entry.create(tp=tp)
    x = np.random.default_rng(6).normal(size=(9, H)).astype(np.float32)
    want = one.ops.moe(x, weights(one, True)[0], GROUPED)
    packed: Any = weights(mesh, True, shard=0)[0]
    assert [w.value.shape for w in packed.down] == [(E // tp, H, F)] * tp
    ranks = mesh.ranks.run(  # type: ignore[attr-defined]
        lambda r: mesh.ops.moe(x, MoeWeights(packed.router[r], packed.gate_up[r], packed.down[r]), GROUPED)
    )
    for got in ranks:
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_experts_that_ranks_cannot_share_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter gate_up: shape\[0\] has 8; expected a multiple of tp \(3\)"):
        weights(entry.create(tp=3), False, shard=0)


def test_of_equal_values_the_lower_id_wins() -> None:
    assert chosen(np.array([[1.0, 3, 3, 2, 3, 0, 2, 2]]), MoeSpec(E, 4)).tolist() == [[1, 2, 4, 3]]
    spec = MoeSpec(E, 3, groups=4, top_groups=2)
    assert chosen(np.array([[0.0, 1, 2, 0, 2, 0, 2, 2]]), spec).tolist() == [[2, 4, 3]]


def test_a_group_that_is_out_stays_out() -> None:
    """Its values are the larger ones when all are negative and the others are masked by zero."""
    spec = replace(GROUPED, top_k=4)
    assert sorted(chosen(np.arange(E)[None] - 10.0, spec)[0].tolist()) == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"groups": 3}, r"groups is 3; expected a divisor of experts \(8\)"),
        ({"top_groups": 5}, r"top_groups is 5; expected 1 to groups \(4\)"),
        ({"group_best": 3}, r"group_best is 3; expected 1 to the experts of a group \(2\)"),
        ({"top_k": 5}, r"top_k is 5; expected 1 to the experts kept \(4\)"),
        ({"top_k": 0}, "top_k is 0"),
        ({"scoring": "relu"}, "scoring is 'relu'; expected 'softmax' or 'sigmoid'"),
    ],
)
def test_impossible_numbers_name_the_field(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(GROUPED, **change)


def test_a_backend_without_experts_declines() -> None:
    with pytest.raises(Unsupported, match="moe"):
        Expansions().moe(None, MoeWeights(None, None, None), GROUPED)
