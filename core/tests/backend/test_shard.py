"""Shards of quantised weights are the quantised shards of the weight, whatever the blocks."""

from __future__ import annotations

from typing import Any, Literal

import ml_dtypes
import numpy as np
import pytest

from polyradix.backend.protocol import ParamKind, ParamPart, ParamSpec, Quant
from polyradix.backend.quant import dequantise
from polyradix.backend.shard import check_param, local_param, shard

Format = Literal["fp8", "int4"]
HUGE = 4096  # one block


def parts_of(quant: Quant, shape: tuple[int, ...]) -> dict[ParamPart, Any]:
    rng = np.random.default_rng(sum(shape))
    (*outer, out, width), (rows, columns) = shape, quant.block
    blocks = (*outer, -(-out // rows), -(-width // columns))
    scale = rng.uniform(0.5, 2, blocks).astype(np.float32)
    if quant.format == "fp8":
        return {"weight": rng.normal(size=shape).astype(ml_dtypes.float8_e4m3fn), "scale": scale}
    codes = rng.integers(0, 256, (*outer, out, width // 2)).astype(np.uint8)
    return {"weight": codes, "scale": scale, "zero": rng.integers(0, 16, blocks).astype(np.uint8)}


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("format", ["fp8", "int4"])
@pytest.mark.parametrize(
    ("kind", "shape", "segments", "axis", "block", "local"),
    [
        ("linear", (96, 40), (64, 16, 16), 0, (8, 4), {2: (8, 4), 4: (4, 4)}),
        ("linear", (96, 40), (48, 48), 0, (16, 40), {2: (8, 40), 4: (4, 40)}),
        ("linear", (96, 40), (), 0, (1, HUGE), {2: (1, HUGE), 4: (1, HUGE)}),
        ("linear_reduce", (10, 48), (), 1, (4, 16), {2: (4, 8), 4: (4, 4)}),
        ("linear_reduce", (10, 48), (), 1, (1, 48), {2: (1, 24), 4: (1, 12)}),
        ("linear_reduce", (10, 48), (), 1, (HUGE, HUGE), {2: (HUGE, 8), 4: (HUGE, 4)}),
        ("experts", (4, 10, 24), (), 0, (4, 16), {2: (4, 16), 4: (4, 16)}),
    ],
)
def test_shards(
    kind: ParamKind,
    shape: Any,
    segments: Any,
    axis: int,
    block: Any,
    local: Any,
    format: Literal["fp8", "int4"],
    tp: int,
) -> None:
    spec = ParamSpec("w", kind, shape, "float32", segments, axis, quant=Quant(format, block))
    check_param(spec, tp)
    parts, mine = parts_of(Quant(format, block), shape), local_param(spec, tp)
    assert mine.quant == Quant(format, local[tp])
    whole = dequantise(Quant(format, block), parts.__getitem__)
    plain = ParamSpec("w", kind, shape, "float32", segments, axis)
    for rank in range(tp):
        got = {part: shard(spec, x, rank, tp, part) for part, x in parts.items()}
        assert got["scale"].nbytes + got["weight"].nbytes <= mine.bytes
        want = shard(plain, whole, rank, tp)
        assert want.shape == mine.shape
        np.testing.assert_array_equal(dequantise(mine.quant, got.__getitem__), want)


def test_columns_of_int4_are_pairs() -> None:
    spec = ParamSpec("w", "linear_reduce", (4, 12), "float32", (), 1, quant=Quant("int4", (1, 4)))
    with pytest.raises(ValueError, match=r"parameter w: shape\[1\] has 12; expected an even number for each rank"):
        check_param(spec, 4)
