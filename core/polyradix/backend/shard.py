"""How a parameter is split over tensor-parallel ranks, on the host: for any backend that wants it."""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import numpy as np

from polyradix.backend.protocol import HostArray, KVSpec, ParamPart, ParamSpec, Quant

# the one axis along which a kind can be split
AXES = {"linear": 0, "linear_reduce": 1, "logits": 0, "experts": 0, "latent_up": 0, "sinks": 0}


def check_param(spec: ParamSpec, tp: int) -> None:
    """Raises ValueError if `spec` cannot be split over `tp` ranks. Reads nothing."""
    if spec.shard_axis is None or tp == 1:
        return
    if AXES.get(spec.kind) != spec.shard_axis:
        raise ValueError(f"parameter {spec.name}: shard_axis is {spec.shard_axis}; {spec.kind} takes {_axis(spec)}")
    if spec.kind == "logits":
        return
    for size in (spec.segments or spec.shape[:1]) if spec.shard_axis == 0 else spec.shape[1:]:
        if size % tp:
            where = "segments" if spec.segments and spec.shard_axis == 0 else f"shape[{spec.shard_axis}]"
            raise ValueError(f"parameter {spec.name}: {where} has {size}; expected a multiple of tp ({tp})")
    if spec.quant is not None and spec.quant.format == "int4" and spec.shard_axis == 1 and spec.shape[1] // tp % 2:
        raise ValueError(f"parameter {spec.name}: shape[1] has {spec.shape[1]}; expected an even number for each rank")


def check_kv(spec: KVSpec, tp: int) -> None:
    """Raises ValueError if the cache's heads cannot be split over `tp` ranks; a latent cache is whole on each."""
    if spec.kind == "full" and spec.kv_heads % tp:
        raise ValueError(f"kv_heads is {spec.kv_heads}; expected a multiple of tp ({tp})")


def local_param(spec: ParamSpec, tp: int) -> ParamSpec:
    """What each rank holds, as a parameter that is whole. Its blocks are so small that no shard cuts one."""
    if spec.shard_axis is None or tp == 1:
        return replace(spec, shard_axis=None)
    shape = list(spec.shape)
    shape[spec.shard_axis] = -(-shape[spec.shard_axis] // tp)
    segments = tuple(n // tp for n in spec.segments) if spec.shard_axis == 0 else spec.segments
    return replace(spec, shape=tuple(shape), segments=segments, shard_axis=None, quant=_finer(spec, tp))


def local_kv(spec: KVSpec, tp: int) -> KVSpec:
    """What each rank holds. Raises as check_kv."""
    check_kv(spec, tp)
    return spec if spec.kind == "latent" else replace(spec, kv_heads=spec.kv_heads // tp)


def shard(spec: ParamSpec, value: HostArray, rank: int, tp: int, part: ParamPart = "weight") -> HostArray:
    """What `rank` holds of a parameter's part; logits get zero rows up to a multiple of tp, and scales and zeros are of
    the blocks that local_param has."""
    if spec.shard_axis is None or tp == 1 or (part == "bias" and spec.shard_axis == 1):
        return value
    if spec.kind == "logits":
        value = np.concatenate([value, np.zeros((-len(value) % tp, *value.shape[1:]), value.dtype)])
    segments, local = spec.segments, _finer(spec, tp)
    if part in ("scale", "zero") and spec.quant is not None and local is not None:
        for axis, (old, new), size in zip(
            (-2, -1), zip(spec.quant.block, local.block, strict=True), spec.shape[-2:], strict=True
        ):
            value = np.repeat(value, old // new, axis).take(range(-(-size // new)), axis)
        if spec.kind != "experts":
            segments = tuple(n // local.block[0] for n in segments)
    if spec.shard_axis == 1:
        return np.split(value, tp, axis=1)[rank]
    pieces = np.split(value, np.cumsum(segments)[:-1]) if len(segments) > 1 else [value]
    mine = [np.split(piece, tp)[rank] for piece in pieces]
    return mine[0] if len(mine) == 1 else np.concatenate(mine)


def _finer(spec: ParamSpec, tp: int) -> Quant | None:
    """The quantisation with blocks of which each rank's shard has whole ones."""
    if spec.quant is None or spec.kind == "experts":
        return spec.quant
    rows, columns = spec.quant.block
    if spec.shard_axis == 0:
        rows = gcd(rows, *(n // tp for n in spec.segments or spec.shape[:1]))
    else:
        columns = gcd(columns, spec.shape[1] // tp)
    return replace(spec.quant, block=(rows, columns))


def _axis(spec: ParamSpec) -> str:
    return f"{AXES[spec.kind]} or None" if spec.kind in AXES else "None"
