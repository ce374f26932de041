"""A block of keys and values, and a softmax that takes in one block after another."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polyradix_tpu.kernels.chip import LANES
from polyradix_tpu.kernels.ragged_paged_attention.sizes import Sizes

HIDDEN = -1e30  # finite, so that a row that has seen nothing yet is not NaN
UPPER = np.uint32(0xFFFF0000)
Ref: TypeAlias = Any


def keys_values(z: Sizes, rows: Ref, words: Ref | None, limit: Any, part: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one head [tokens, D]; flat, of all heads at once [tokens*Hk, D]. From token `limit` on they
    are zeros, since what is there is nobody's, and 0 * NaN is NaN."""
    if words is None:
        return _apart(rows[...], limit * z.heads)
    count, stride = (z.columns, 1) if z.tile == 1 else (z.tokens, z.heads)
    if z.pack == 1:
        return _strided(words, 2 * part, count, 2 * stride), _strided(words, 2 * part + 1, count, 2 * stride)
    pair = _strided(words, part, count, stride)  # a key's bits are the lower half, its value's the upper one
    k, v = (pltpu.bitcast(x, jnp.float32).astype(rows.dtype) for x in (pair << 16, pair & UPPER))
    return k, v


def unpack(z: Sizes, rows: Ref, words: Ref, limit: Any) -> None:
    """rows [n,D] into words [D/LANES, n', LANES] of 32 bits: only such can be read with a stride."""
    for c in range(words.shape[0]):
        part = pltpu.bitcast(rows[:, c * words.shape[2] : (c + 1) * words.shape[2]], words.dtype)
        words[c] = _until(part, limit * z.rows // z.pack)


def _apart(rows: jax.Array, limit: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of 16 bits [n,D] among rows [2n,D]. Row 2i of either is the i-th, row 2i + 1 is the n/2 + i-th:
    two words with a key and a value each become one with two keys and one with two values."""
    one, two = jnp.split(_until(pltpu.bitcast(rows, jnp.uint32), limit), 2)
    k, v = (one & ~UPPER) | (two << 16), (one >> 16) | (two & UPPER)
    return pltpu.bitcast(k, rows.dtype), pltpu.bitcast(v, rows.dtype)


def _until(words: jax.Array, limit: Any) -> jax.Array:
    at = lax.broadcasted_iota(jnp.int32, words.shape, 0)
    return jnp.where(at < limit, words, jnp.zeros((), words.dtype))


def _strided(words: Ref, first: Any, size: int, stride: int) -> jax.Array:
    return jnp.concatenate([words[c, pl.ds(first, size, stride=stride), :] for c in range(words.shape[0])], axis=1)


@dataclass(frozen=True)
class Softmax:
    """Of rows [parts,M]: `top` [parts,M,LANES] their greatest scores, `total` [parts,M,LANES] their weights, summed by
    lane, and `acc` [parts,M,D] their weighted values, all float32."""

    z: Sizes
    top: Ref
    total: Ref
    acc: Ref

    def begin(self, sinks: Ref | None) -> None:
        self.top[...] = jnp.full(self.top.shape, HIDDEN, jnp.float32) if sinks is None else sinks[...]
        lane = lax.broadcasted_iota(jnp.int32, self.total.shape, 2)
        self.total[...] = jnp.where(lane == 0, 0.0 if sinks is None else 1.0, 0.0)
        self.acc[...] = jnp.zeros(self.acc.shape, jnp.float32)

    def result(self) -> jax.Array:
        total = self.total[...].sum(axis=2, keepdims=True)
        return self.acc[...] / jnp.where(total == 0, 1, total)

    def add(self, part: Any, q: jax.Array, k: jax.Array, v: jax.Array, offsets: Ref, bound: Any) -> None:
        """Rows q [M,D] meet a block: keys whose offset is at most `bound` are not later than the row."""
        top, total, acc = self.top.at[part], self.total.at[part], self.acc.at[part]
        exact = lax.Precision.HIGHEST if k.dtype == jnp.float32 else lax.Precision.DEFAULT
        dot = partial(lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
        score = dot(q, k, (((1,), (1,)), ((), ())))
        chunks = jnp.split(score, score.shape[1] // self.z.chunk, axis=1)
        scores = [self._masked(x, offsets[...], bound - c * self.z.step) for c, x in enumerate(chunks)]
        before = top[...][:, :1]
        now = jnp.maximum(before, reduce(jnp.maximum, scores).max(axis=1, keepdims=True))
        weights = [jnp.exp(x - now) for x in scores]
        fade = jnp.exp(before - now)
        sums = reduce(jnp.add, weights)
        top[...] = jnp.broadcast_to(now, top.shape)
        total[...] = total[...] * fade + reduce(jnp.add, jnp.split(sums, sums.shape[1] // LANES, axis=1))
        p = jnp.concatenate([x.astype(v.dtype) for x in weights], axis=1)
        acc[...] = acc[...] * fade + dot(p, v, (((1,), (0,)), ((), ())))

    def _masked(self, score: jax.Array, offsets: jax.Array, bound: Any) -> jax.Array:
        z, score = self.z, score * self.z.scale
        if z.softcap is not None:
            score = z.softcap * jnp.tanh(score / z.softcap)
        seen = offsets <= bound
        if z.window is not None:
            seen &= offsets > bound - z.window
        return jnp.where(seen, score, HIDDEN)
