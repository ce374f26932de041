"""L1: products with weights that are kept as their checkpoint has them, against the oracle.

A weight may be rounded to the dtype before it is multiplied, so the floors have runs of both sorts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, Literal

import ml_dtypes
import numpy as np

from polyradix.backend.protocol import HostArray, MoeSpec, MoeWeights, ParamKind, ParamPart, ParamSpec, Quant
from polyradix_conformance import oracle
from polyradix_conformance.cases import case
from polyradix_conformance.cases.moe import SOFTMAX, clear_rows, experts
from polyradix_conformance.inputs import values
from polyradix_conformance.oracle import EXACT, Arr, rounded
from polyradix_conformance.oracle_moe import Experts, moe
from polyradix_conformance.oracle_quant import Stored, weight
from polyradix_conformance.rig import Rig
from polyradix_conformance.tolerance import floor

Format = Literal["fp8", "int4"]
SHAPE = (320, 192)  # the last blocks of 128 are cut
BLOCKS: dict[str, tuple[Format, tuple[int, int]]] = {
    "fp8-block": ("fp8", (128, 128)),
    "fp8-channel": ("fp8", (1, SHAPE[1])),
    "int4-group-64": ("int4", (1, 64)),
    "int4-group-32": ("int4", (1, 32)),
}


@cache
def stored(format: Format, block: tuple[int, int], shape: tuple[int, ...], seed: str = "") -> Stored:
    """Seeded codes, of fp8 all up to 30, and scales up to 16 times apart from block to block."""
    random = np.random.default_rng([*shape, *block, *seed.encode()])
    (*outer, out, width), (rows, columns) = shape, block
    blocks = (*outer, -(-out // rows), -(-width // columns))
    unit = 1 / (8 * np.sqrt(width))
    scale = rounded(unit * 2 ** random.uniform(-2, 2, blocks), "float32")
    if format == "int4":
        return Stored(format, block, random.integers(0, 16, shape), scale, random.integers(0, 16, blocks))
    codes = random.integers(0, 0x60, shape) | random.integers(0, 2, shape) << 7
    return Stored(format, block, codes, scale / 2)


def pack(rig: Rig, kind: ParamKind, s: Stored, bias: Arr | None = None) -> Any:
    codes = s.codes.astype(np.uint8)
    held = {
        "weight": codes.view(ml_dtypes.float8_e4m3fn) if s.format == "fp8" else codes[..., ::2] | codes[..., 1::2] << 4,
        "scale": s.scale.astype(np.float32),
        "zero": None if s.zero is None else s.zero.astype(np.uint8),
        "bias": None if bias is None else bias.astype(oracle.HOST[rig.dtype]),
    }

    def read(part: ParamPart = "weight") -> HostArray:
        out = held[part]
        if out is None:
            raise ValueError(f"{part} was read; there is none")
        return out

    quant = Quant("fp8" if s.format == "fp8" else "int4", s.block)
    spec = ParamSpec("quantised", kind, s.codes.shape, rig.dtype, bias=bias is not None, quant=quant)
    return rig.backend.pack(spec, read)


def product(rig: Rig, name: str, verb: ParamKind, rows: int = 37, biased: bool = False) -> None:
    s = stored(*BLOCKS[name], SHAPE)
    bias = values("quant bias", SHAPE[:1], rig.dtype) if biased else None
    top = {"w": pack(rig, verb, s, bias)}
    x, exact = values("quant x", (rows, SHAPE[1]), rig.dtype), weight(s)
    truth = oracle.linear(EXACT, x, exact, bias)
    weights = exact, rounded(exact, rig.dtype)
    others = [oracle.linear(p, x, w, bias) for p in oracle.emulated(rig.dtype) for w in weights]
    got = rig.verb(lambda ops, x, top, m: getattr(ops, verb)(x, top["w"]), x, top, SHAPE[0])
    rig.close(f"{verb}, {name}, {rows} rows", got, truth, floor(truth, others, rig.dtype))


def counts(rig: Rig, name: str) -> None:
    """From one row to a batch of them."""
    for rows in (1, 2, 5, 64):
        product(rig, name, "linear", rows)


def gated(rig: Rig, name: str) -> None:
    format, block = BLOCKS[name]
    s = stored(format, block, (256, SHAPE[1]), "gated")
    top = {"w": pack(rig, "linear", s)}
    x, exact = values("quant gated x", (20, SHAPE[1]), rig.dtype), weight(s)

    def run(p: oracle.Precision, w: Arr) -> Arr:
        return oracle.gated(p, oracle.linear(p, x, w))

    truth = run(EXACT, exact)
    others = [run(p, w) for p in oracle.emulated(rig.dtype) for w in (exact, rounded(exact, rig.dtype))]
    got = rig.verb(lambda ops, x, top, m: ops.linear_gated(x, top["w"], "silu"), x, top, 128)
    rig.close(f"linear_gated, {name}", got, truth, floor(truth, others, rig.dtype))


def mixture(rig: Rig, name: str, rows: int) -> None:
    """Experts of 256 rows of gate and up and, two blocks across, of 192 columns of down."""
    (format, (tall, wide)), base = BLOCKS[name], experts(rig.dtype)
    count, hidden = base.router.shape
    channel = wide == SHAPE[1]
    up = stored(format, (tall, hidden if channel else wide), (count, 384, hidden), "up")
    down = stored(format, (tall, 192 if channel else wide), (count, hidden, 192), "down")
    top = {"router": rig.pack("router", base.router)}
    top |= {"up": pack(rig, "experts", up), "down": pack(rig, "experts", down)}
    exact = replace(base, gate_up=weight(up), down=weight(down))
    narrow = replace(base, gate_up=rounded(exact.gate_up, rig.dtype), down=rounded(exact.down, rig.dtype))
    x = clear_rows(values("moe x", (3 * rows + 8, hidden), rig.dtype), base, SOFTMAX)[:rows]

    def run(p: oracle.Precision, w: Experts) -> Arr:
        return moe(p, x, w, SOFTMAX)

    truth, others = run(EXACT, exact), [run(p, w) for p in oracle.emulated(rig.dtype) for w in (exact, narrow)]
    spec = MoeSpec(SOFTMAX.experts, SOFTMAX.top_k)

    def verb(ops: Any, x: Any, top: dict[str, Any], m: Any) -> Any:
        return ops.moe(x, MoeWeights(top["router"], top["up"], top["down"]), spec)

    rig.close(f"moe, {name}", rig.verb(verb, x, top, hidden), truth, floor(truth, others, rig.dtype))


for dtype in ("float32", "bfloat16"):
    for name, (format, _) in BLOCKS.items():
        feature = f"quant_{format}"
        bodies: dict[str, Callable[..., None]] = {
            "linear": partial(product, verb="linear"),
            "linear/bias": partial(product, verb="linear", biased=True),
            "linear_reduce": partial(product, verb="linear_reduce"),
            "linear/counts": counts,
            "linear_gated": gated,
            "moe": partial(mixture, rows=10),
        }
        for verb, body in bodies.items():
            features = (feature, "moe") if verb == "moe" else (feature,)
            case(f"L1/quant/{verb}/{name}", dtype, partial(body, name=name), features=features, profile="quant")
