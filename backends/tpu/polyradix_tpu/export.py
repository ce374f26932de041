"""Parameters as a flax `nnx.State`, for people and tools that speak flax. Needs the extra `flax`; no step uses this."""

from __future__ import annotations

from typing import Any

from flax import nnx

from polyradix.backend.protocol import Params, Weight
from polyradix_tpu.mesh import partition


def to_nnx(params: Params) -> Any:
    """State {top: {name: {value, bias}}, layers: {i: the same}} of nnx.Param that share the arrays of `params`, with
    their places on the mesh as `out_sharding`. The rows of a split parameter are in rank order."""
    layers = {i: _each(held) for i, held in enumerate(params.layers)}
    return nnx.State({"top": _each(params.top), "layers": layers})


def _each(held: dict[str, Weight]) -> dict[str, Any]:
    return {name: _variables(w) for name, w in held.items()}


def _variables(w: Weight) -> dict[str, Any]:
    specs = partition(w)
    value = {"value": nnx.Param(w.value, out_sharding=tuple(specs.value), eager_sharding=False)}
    if w.bias is None:
        return value
    return value | {"bias": nnx.Param(w.bias, out_sharding=tuple(specs.bias), eager_sharding=False)}
