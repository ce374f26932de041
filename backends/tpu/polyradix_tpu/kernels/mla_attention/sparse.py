"""Attention over the rows that an indexer selects: see IndexSpec in the contract. `score` may be a Pallas kernel; the
selection and what is attended to are XLA's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp

from polyradix.backend.protocol import IndexSpec, LatentSpec
from polyradix_tpu.batch import JaxMeta
from polyradix_tpu.kernels.xla import BUDGET, HIDDEN, precision

Score: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, int], jax.Array]  # index_scores'


def attend(
    q: jax.Array,
    index: jax.Array,
    weights: jax.Array,
    cache: jax.Array,
    m: JaxMeta,
    a: LatentSpec,
    s: IndexSpec,
    score: Score,
) -> jax.Array:
    """Absorbed queries [T,H,R+rope], index [T,heads,dim] in the dtype of the cache, weights [T,heads] float32, cache
    [pages, page, W] with the key behind each row: -> [T,H,R]. Tiles take turns if all need more than BUDGET."""
    context, size, tile = m.shape.pages * cache.shape[1], cache.dtype.itemsize, m.shape.tile
    seen = min(s.top_k, context) * tile * (cache.shape[2] * size + 4 * q.shape[1])
    each = max(1, min(m.shape.tiles, BUDGET // (context * (s.dim * size + 4 * s.heads * tile) + seen)))
    turns = -(-m.shape.tiles // each)
    tiles = (jnp.pad(x, (0, turns * each - len(x))).reshape(turns, each) for x in (m.tile_row, m.tile_seq))

    def some(at: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _tiles(*at, q, index, weights, cache, m, a, s, score)

    out = jax.lax.map(some, tuple(tiles))
    return out.reshape(-1, *out.shape[3:])[m.where]


def _tiles(
    first: jax.Array,
    seqs: jax.Array,
    q: jax.Array,
    index: jax.Array,
    weights: jax.Array,
    cache: jax.Array,
    m: JaxMeta,
    a: LatentSpec,
    s: IndexSpec,
    score: Score,
) -> jax.Array:
    """The tiles that start at rows `first` [C] of sequences `seqs` [C] -> [C,tile,H,R]."""
    width, page = a.rank + a.rope, cache.shape[1]
    row = jnp.minimum(first[:, None] + jnp.arange(m.shape.tile), m.shape.tokens - 1)  # [C,tile]
    pages, mine = m.pages[seqs], m.positions[row]
    found = score(index[row], weights[row], cache, pages, jnp.max(mine, axis=1) + 1, width)
    found = jnp.where(jnp.arange(found.shape[2]) <= mine[..., None], found, -jnp.inf)
    best, ids = jax.lax.top_k(found, min(s.top_k, found.shape[2]))  # of equal ones, the first
    seen = best > -jnp.inf
    ids = jnp.where(seen, ids, ids[..., :1])  # a row that is seen: those that nobody wrote may be NaN
    which = jnp.take_along_axis(pages[:, None], ids // page, axis=2)
    rows = cache.reshape(-1, cache.shape[2])[which * page + ids % page][..., :width]
    einsum = partial(jnp.einsum, precision=precision(cache.dtype), preferred_element_type=jnp.float32)
    each = jnp.where(seen[:, :, None], a.scale * einsum("cqhw,cqkw->cqhk", q[row], rows), HIDDEN)
    e = jnp.exp(each - each.max(axis=-1, keepdims=True))
    total, e = e.sum(axis=-1, keepdims=True), e.astype(cache.dtype)
    return (einsum("cqhk,cqkr->cqhr", e, rows[..., : a.rank]) / total).astype(q.dtype)
