"""Quantised weights in whole verbs, interpreted; and blocks that the kernels have not."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from interpreted_backend import Interpreted

from polyradix.backend.protocol import MoeSpec, MoeWeights, ParamSpec, Quant
from polyradix_conformance import oracle
from polyradix_conformance.cases.moe import SOFTMAX, E, F, H, clear_rows, experts
from polyradix_conformance.cases.quant import BLOCKS, pack, stored
from polyradix_conformance.inputs import values
from polyradix_conformance.oracle import EXACT, rounded
from polyradix_conformance.oracle_moe import moe
from polyradix_conformance.oracle_quant import weight
from polyradix_conformance.rig import Rig
from polyradix_conformance.tolerance import floor
from polyradix_torch.ops import Linear
from polyradix_torch.quant import Codes
from polyradix_torch.triton.moe import Biased

pytestmark = pytest.mark.usefixtures("exact")


@pytest.mark.parametrize(("name", "dense"), [("fp8-block", "none"), ("int4-group-32", "down")])
def test_experts_with_biases_and_a_clamped_gate(name: str, dense: str) -> None:
    """As gpt-oss has them, against the oracle; one of an expert's weights may be dense."""
    (format, block), rig = BLOCKS[name], Rig(Interpreted(1), "bfloat16")
    base = experts("bfloat16", E, True, F, True)
    up, down = stored(format, block, (E, 2 * F, H), "up"), stored(format, block, (E, H, F), "down")
    exact = replace(base, gate_up=weight(up), down=weight(down))
    routing = replace(SOFTMAX, bias="logits", limit=1.25, alpha=1.702)
    x = clear_rows(values("moe x", (14, H), "bfloat16"), base, routing)
    top = {"router": rig.pack("router", base.router, base.bias), "up": pack(rig, "experts", up, base.gate_up_bias)}
    if dense == "down":
        exact = replace(exact, down=rounded(exact.down, "bfloat16"))
        top["down"] = rig.pack("experts", exact.down, base.down_bias)
    else:
        top["down"] = pack(rig, "experts", down, base.down_bias)
    assert isinstance(top["up"], Biased)
    assert isinstance(top["up"].weight, Codes)
    narrow = replace(exact, gate_up=rounded(exact.gate_up, "bfloat16"), down=rounded(exact.down, "bfloat16"))
    truth = moe(EXACT, x, exact, routing)
    others = [moe(p, x, w, routing) for p in oracle.emulated("bfloat16") for w in (exact, narrow)]

    def verb(ops: Any, x: Any, top: dict[str, Any], m: Any) -> Any:
        return ops.moe(x, MoeWeights(top["router"], top["up"], top["down"]), MoeSpec(**asdict(routing)))

    rig.close(name, rig.verb(verb, x, top, H), truth, floor(truth, others, "bfloat16"))


@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_blocks_that_the_kernel_has_not_are_packed_dense(kind: Any) -> None:
    shape = (16, 24) if kind == "linear" else (2, 16, 24)
    random, at = np.random.default_rng(1), (*shape[:-1], 2)
    parts: dict[str, Any] = {
        "weight": random.integers(0, 256, (*shape[:-1], 12)).astype(np.uint8),
        "scale": np.full(at, 0.5, np.float32),
        "zero": np.full(at, 3, np.uint8),
    }
    spec = ParamSpec("w", kind, shape, "float32", quant=Quant("int4", (1, 12)))
    packed = Interpreted(1).pack(spec, lambda part="weight": parts[part])
    assert isinstance(packed, Linear if kind == "linear" else torch.Tensor)
    nibbles = np.stack([parts["weight"] & 15, parts["weight"] >> 4], -1).reshape(shape).astype(np.float64)
    np.testing.assert_array_equal((packed.weight if kind == "linear" else packed).numpy(), (nibbles - 3) * 0.5)
