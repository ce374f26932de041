"""Sampling and log probabilities on the device, as polyradix.backend.sampling defines them."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polyradix.backend.batch import SampleBatch


def sample(logits: jax.Array, batch: SampleBatch) -> jax.Array:
    """logits f32[S',V] -> i32[S']; the rows beyond those of `batch` mean nothing."""
    logits = _adjusted(logits, batch)
    if batch.greedy and batch.mask is None:
        return _best(logits)
    pad = len(logits) - len(batch.seed)
    columns = [np.pad(np.stack(x), ((0, 0), (0, pad))) for x in _columns(batch)]
    mask = None if batch.mask is None else np.pad(batch.mask, ((0, pad), (0, 0)))
    filtered = bool(batch.top_k.any() or (batch.top_p < 1).any() or batch.min_p.any())
    return _sample(logits, *columns, mask, filtered)


def _adjusted(logits: jax.Array, batch: SampleBatch) -> jax.Array:
    """Padded to a power of two, so that few programs are compiled; the padding is in no row."""
    a = batch.adjust
    if a is None:
        return logits
    pad = (1 << len(a.row).bit_length()) - len(a.row)
    row, id = np.pad(a.row, (0, pad), constant_values=len(logits)), np.pad(a.id, (0, pad))
    return _adjust(logits, row, id, np.pad(a.factor, (0, pad), constant_values=1), np.pad(a.add, (0, pad)))


@partial(jax.jit)
def _adjust(x: jax.Array, row: jax.Array, id: jax.Array, factor: jax.Array, add: jax.Array) -> jax.Array:
    old = x.at[row, id].get(mode="fill", fill_value=0)
    return x.at[row, id].set(jnp.where(old > 0, old / factor, old * factor) + add, mode="drop")


_best = jax.jit(lambda x: jnp.argmax(x, axis=1).astype(jnp.int32))


def _columns(b: SampleBatch) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return (b.temperature, b.top_p, b.min_p), (b.top_k, b.seed, b.position)


@partial(jax.jit, static_argnames="filtered")
def _sample(x: jax.Array, floats: jax.Array, ints: jax.Array, mask: jax.Array | None, filtered: bool) -> jax.Array:
    temperature, top_p, min_p = floats[:, :, None]
    top_k, seed, position = ints[:, :, None]
    ids = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape)
    if mask is not None:
        x = jnp.where((mask[:, ids[0] // 32] >> (ids[0] % 32)) & 1, x, -jnp.inf)
    greedy = temperature == 0
    z = x / jnp.where(greedy, 1, temperature)
    if filtered:
        down, ids = jax.lax.sort((-z, ids), dimension=1, num_keys=2)
        z = jnp.where(_stays(-down, top_k, top_p, min_p), -down, -jnp.inf)
    score = z + jnp.where(greedy, 0, gumbel(seed, position, ids))
    best = jnp.where(score == score.max(axis=1, keepdims=True), ids, x.shape[1])
    return best.min(axis=1)


def _stays(z: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array) -> jax.Array:
    """Which ranks of z [S,V], sorted descending, pass the filters; the first always does."""
    rank = jnp.arange(z.shape[1])
    z = jnp.where((rank < top_k) | (top_k == 0), z, -jnp.inf)
    p = jax.nn.softmax(z, axis=1)
    inside = (jnp.cumsum(p, axis=1) - p < top_p) | (top_p == 1)
    return (inside & (p >= min_p * p[:, :1]) & (z > -jnp.inf)) | (rank == 0)


def gumbel(seed: jax.Array, position: jax.Array, ids: jax.Array) -> jax.Array:
    """Noise f32 for int32 seeds and positions [S,1] and ids [S,V]."""
    h = _mix(_mix(_mix(_bits(seed)) ^ _bits(position)) ^ _bits(ids))
    u = ((h >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(u))


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    """The murmur3 finaliser on uint32."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


@partial(jax.jit, static_argnames="top")
def logprobs(logits: jax.Array, tokens: jax.Array, top: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the chosen tokens f32[S'], and the `top` best: ids i32[S',top] and values f32[S',top]."""
    logs = jax.nn.log_softmax(logits, axis=1)
    values, ids = jax.lax.top_k(logs, top)
    return jnp.take_along_axis(logs, tokens[:, None], axis=1)[:, 0], ids, values
