"""Mixture of experts in JAX: who goes to whom, and a rank's own experts over rows that are sorted by expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from polyradix.backend.protocol import MoeSpec

Rows: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]


def route(logits: jax.Array, bias: jax.Array | None, s: MoeSpec) -> tuple[jax.Array, jax.Array]:
    """Ids i32 [T,top_k] of the chosen experts, best first, and their weights float32, from logits [T,experts]."""
    if s.bias == "logits" and bias is not None:
        logits, bias = logits + bias, None
    score = jax.nn.softmax(logits, axis=-1) if s.scoring == "softmax" else jax.nn.sigmoid(logits)
    _, ids = jax.lax.top_k(_kept(score if bias is None else score + bias, s), s.top_k)  # the lower id among equals
    weights = jnp.take_along_axis(score, ids, axis=1)
    if s.renormalise:
        weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return ids, weights * s.scale


def with_bias(rows: jax.Array, bias: jax.Array | None, sizes: jax.Array) -> jax.Array:
    """Rows [n,N], sorted by expert, plus their expert's of bias [E,N]; those that no expert has stay as they are."""
    if bias is None:
        return rows
    ends, at = jnp.cumsum(sizes), jnp.arange(len(rows))
    expert = jnp.minimum(jnp.searchsorted(ends, at, side="right"), len(bias) - 1)
    added = rows.astype(jnp.float32) + bias.astype(jnp.float32)[expert]
    return jnp.where((at < ends[-1])[:, None], added, rows).astype(rows.dtype)


def clamped(x: jax.Array, s: MoeSpec) -> jax.Array:
    """The gate of a MoeSpec with a limit: [n,2F] -> [n,F]."""
    assert s.limit is not None
    gate, up = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    gate, up = jnp.minimum(gate, s.limit), jnp.clip(up, -s.limit, s.limit)
    return (gate * jax.nn.sigmoid(s.alpha * gate) * (up + 1)).astype(x.dtype)


def _kept(choice: jax.Array, s: MoeSpec) -> jax.Array:
    """Choice values [T,experts], -inf for experts of groups that are out."""
    grouped = choice.reshape(len(choice), s.groups, -1)
    best = jax.lax.top_k(grouped, s.group_best)[0].sum(axis=2)
    _, groups = jax.lax.top_k(best, s.top_groups)
    kept = (groups[..., None] == jnp.arange(s.groups)).any(axis=1)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)


def spread(x: jax.Array, ids: jax.Array, weights: jax.Array, first: jax.Array | int, here: int, run: Rows) -> jax.Array:
    """Float32 [T,H]: the weighted sum over the chosen experts from `first` on, of which `here` are. `run` takes rows
    [T*top_k,H] sorted by expert and how many each has, i32 [here]; it gives zeros for the rows that are left."""
    own = ids.ravel() - first
    own = jnp.where((own >= 0) & (own < here), own, here)
    order = jnp.argsort(own, stable=True)
    sizes = jnp.sum(own[:, None] == jnp.arange(here), axis=0, dtype=jnp.int32)
    parts = run(x[order // ids.shape[1]], sizes)[jnp.argsort(order)].reshape(*ids.shape, -1)
    return jnp.sum(parts.astype(jnp.float32) * weights[..., None], axis=1)
