"""Expansions of the fused verbs, and the per-layer loop: what a backend gets for free.

A backend's Ops inherits `Expansions` and overrides a verb only when its own is faster. `POLYRADIX_EXPAND=all` forces
every fused verb back to its expansion, which is the first thing to try when a result looks wrong.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import (
    KV,
    Array,
    Gate,
    Index,
    IndexSpec,
    LatentSpec,
    LatentWeights,
    LayerBody,
    Meta,
    MoeSpec,
    MoeWeights,
    Ops,
    Weight,
)

FUSED = ("add_rms_norm", "linear_gated")


class Expansions:
    """Mixin for Ops. Needs add, rms_norm, linear and gated from the class it is mixed into, and a KV that is a list
    with one entry per layer if `layers` is inherited too. `moe`, `attend_latent` and `attend_sparse` are no expansions:
    they decline."""

    def add_rms_norm(self: Any, x: Array, residual: Array, w: Weight, eps: float) -> tuple[Array, Array]:
        total = self.add(residual, x)
        return self.rms_norm(total, w, eps), total

    def linear_gated(self: Any, x: Array, w: Weight, kind: Gate) -> Array:
        return self.gated(self.linear(x, w), kind)

    def moe(self: Any, x: Array, w: MoeWeights, s: MoeSpec) -> Array:
        raise Unsupported("moe")

    def attend_latent(
        self: Any, q: Array, c: Array, kv: KV, m: Meta, w: LatentWeights, a: LatentSpec
    ) -> tuple[Array, KV]:
        raise Unsupported("mla")

    def attend_sparse(
        self: Any, q: Array, c: Array, x: Index, kv: KV, m: Meta, w: LatentWeights, a: LatentSpec, s: IndexSpec
    ) -> tuple[Array, KV]:
        raise Unsupported("indexer")

    def layers(
        self, bodies: Sequence[LayerBody], params: Sequence[dict[str, Weight]], carry: Any, kv: KV
    ) -> tuple[Any, KV]:
        out: list[KV] = []
        for body, layer, layer_kv in zip(bodies, params, kv, strict=True):
            carry, layer_kv = body(layer, carry, layer_kv)
            out.append(layer_kv)
        return carry, out


class Expanded:
    """Wraps an Ops so that every fused verb is its expansion over the wrapped backend's own basic verbs."""

    def __init__(self, ops: Ops) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    add_rms_norm = Expansions.add_rms_norm
    linear_gated = Expansions.linear_gated


def expansion_forced() -> bool:
    """True when POLYRADIX_EXPAND=all. Any other value than empty or `all` is an error."""
    value = os.environ.get("POLYRADIX_EXPAND", "")
    if value not in ("", "all"):
        raise ValueError(f"POLYRADIX_EXPAND is {value!r}; expected 'all' or unset")
    return value == "all"
