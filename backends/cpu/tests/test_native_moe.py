"""Native experts against NumPy in float64: blocks of rows for one expert, none for another, sizes with tails."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from polyradix.backend.protocol import MoeSpec, MoeWeights
from polyradix_cpu.native import NativeOps, NativeWeight, load
from polyradix_cpu.native.params import pack_experts

E, H, F, TOKENS = 5, 2100, 40, 150  # a block has 96 rows of this width in float32
SPECS = {
    "softmax": MoeSpec(E, 2),
    "one": MoeSpec(E, 1, renormalise=False, scale=0.5),
    "sigmoid": MoeSpec(E, 3, "sigmoid"),
}


def randn(seed: int, *shape: int) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().float() / shape[-1] ** 0.5


@pytest.fixture(scope="module")
def ops() -> NativeOps:
    library = load()
    assert library is not None, "no native library: build it with `pip install -e backends/cpu`"
    return NativeOps(library, threads=2)


@pytest.fixture(scope="module")
def host() -> dict[str, Any]:
    """The first expert is everybody's, the last is nobody's."""
    router, x = randn(1, E, H) / 2, randn(2, TOKENS, H) * H**0.5
    router[0, 0], router[-1, 0], x[:, 0] = 0.75, -0.75, 4
    return {"router": router, "x": x, "gate_up": 2 * randn(3, E, 2 * F, H), "down": randn(4, E, H, F)}


def by_hand(host: dict[str, Any], s: MoeSpec) -> Any:
    x, router, gate_up, down = (host[n].double().numpy() for n in ("x", "router", "gate_up", "down"))
    z = x @ router.T
    score = np.exp(z) / np.exp(z).sum(1, keepdims=True) if s.scoring == "softmax" else 1 / (1 + np.exp(-z))
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        ids = np.argsort(-score[t])[: s.top_k]
        assert E - 1 not in ids
        for e in ids:
            gate, up = np.split(gate_up[e] @ row, 2)
            weight = score[t, e] / (score[t, ids].sum() if s.renormalise else 1) * s.scale
            out[t] += weight * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def weights(host: dict[str, Any], dtype: Any) -> MoeWeights:
    router = NativeWeight("router", host["router"], (E, H))
    return MoeWeights(router, pack_experts(host["gate_up"].to(dtype)), pack_experts(host["down"].to(dtype)))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_values_and_the_bits_of_a_token_alone(
    ops: NativeOps, host: dict[str, Any], name: str, dtype: Any, bound: float
) -> None:
    s, w, x = SPECS[name], weights(host, dtype), host["x"].to(dtype)
    got, want = ops.moe(x, w, s), by_hand(host, s)
    assert np.abs(got.double().numpy() - want).max() < bound * np.abs(want).max()
    for part in (slice(0, 1), slice(149, 150), slice(3, 40)):
        assert torch.equal(ops.moe(x[part], w, s), got[part])
    assert torch.equal(NativeOps(ops.library, threads=1).moe(x, w, s), got)


def test_a_token_of_nan_spoils_no_other(ops: NativeOps, host: dict[str, Any]) -> None:
    s, w = SPECS["softmax"], weights(host, torch.float32)
    spoilt = host["x"].clone()
    spoilt[7] = float("nan")
    got = ops.moe(spoilt, w, s)
    assert got[7].isnan().all()
    others = [t for t in range(TOKENS) if t != 7]
    assert torch.equal(got[others], ops.moe(host["x"], w, s)[others])


def test_a_dtype_that_is_not_the_experts_is_named(ops: NativeOps, host: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"x is \(150, 2100\) torch.float32; expected rows of 2100 torch.bfloat16"):
        ops.moe(host["x"], weights(host, torch.bfloat16), SPECS["softmax"])
