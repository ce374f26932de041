"""How a parameter is split over tensor-parallel ranks, on the host: for any backend that wants it."""

from __future__ import annotations

from typing import Literal

import numpy as np

from polyradix.backend.protocol import HostArray, KVSpec, ParamSpec

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


def check_kv(spec: KVSpec, tp: int) -> None:
    """Raises ValueError if the cache's heads cannot be split over `tp` ranks; a latent cache is whole on each."""
    if spec.kind == "full" and spec.kv_heads % tp:
        raise ValueError(f"kv_heads is {spec.kv_heads}; expected a multiple of tp ({tp})")


def shard(
    spec: ParamSpec, value: HostArray, rank: int, tp: int, part: Literal["weight", "bias"] = "weight"
) -> HostArray:
    """What `rank` holds of a parameter's weight or bias; logits get zero rows up to a multiple of tp."""
    if spec.shard_axis is None or (part == "bias" and spec.shard_axis == 1):
        return value
    if spec.kind == "logits":
        value = np.concatenate([value, np.zeros((-len(value) % tp, *value.shape[1:]), value.dtype)])
    if spec.shard_axis == 1:
        return np.split(value, tp, axis=1)[rank]
    pieces = np.split(value, np.cumsum(spec.segments)[:-1]) if spec.segments else [value]
    return np.concatenate([np.split(piece, tp)[rank] for piece in pieces])


def _axis(spec: ParamSpec) -> str:
    return f"{AXES[spec.kind]} or None" if spec.kind in AXES else "None"
