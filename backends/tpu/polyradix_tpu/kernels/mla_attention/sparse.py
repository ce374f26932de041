"""Attention over the rows that an indexer selects, in plain XLA: see IndexSpec in the contract."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from polyradix.backend.protocol import IndexSpec, LatentSpec
from polyradix_tpu.batch import JaxMeta
from polyradix_tpu.kernels.xla import BUDGET, HIDDEN, precision


def attend(
    q: jax.Array, index: jax.Array, weights: jax.Array, cache: jax.Array, m: JaxMeta, a: LatentSpec, s: IndexSpec
) -> jax.Array:
    """Absorbed queries [T,H,R+rope], index [T,heads,dim] in the dtype of the cache, weights [T,heads] float32, cache
    [pages, page, W] with the key behind each row: -> [T,H,R]. Tiles take turns if all need more than BUDGET."""
    context, size, tile = m.shape.pages * cache.shape[1], cache.dtype.itemsize, m.shape.tile
    seen = min(s.top_k, context) * tile * (cache.shape[2] * size + 4 * q.shape[1])
    each = max(1, BUDGET // (context * (cache.shape[2] * size + 4 * s.heads * tile) + seen))

    def one(at: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _tile(*at, q, index, weights, cache, m, a, s)

    out = jax.lax.map(one, (m.tile_row, m.tile_seq), batch_size=min(each, m.shape.tiles))
    return out.reshape(-1, *out.shape[2:])[m.where]


def _tile(
    first: jax.Array,
    seq: jax.Array,
    q: jax.Array,
    index: jax.Array,
    weights: jax.Array,
    cache: jax.Array,
    m: JaxMeta,
    a: LatentSpec,
    s: IndexSpec,
) -> jax.Array:
    """The tile that starts at row `first` of sequence `seq` -> [tile,H,R]."""
    width, exact = a.rank + a.rope, precision(cache.dtype)
    row = jnp.minimum(first + jnp.arange(m.shape.tile), m.shape.tokens - 1)
    held = cache[m.pages[seq]].reshape(-1, cache.shape[2])
    keys, at = held[:, width : width + s.dim], jnp.arange(len(held))
    each = jnp.einsum("qhd,kd->qhk", index[row], keys, precision=exact, preferred_element_type=jnp.float32)
    score = jnp.einsum("qh,qhk->qk", weights[row], jax.nn.relu(each), precision=jax.lax.Precision.HIGHEST)
    score = jnp.where(at <= m.positions[row][:, None], score, -jnp.inf)
    best, ids = jax.lax.top_k(score, min(s.top_k, len(held)))  # of equal ones, the first
    seen = best > -jnp.inf
    rows = jnp.where(seen[..., None], held[ids][..., :width], 0)  # rows that nobody wrote may be NaN
    score = a.scale * jnp.einsum("qhw,qkw->qhk", q[row], rows, precision=exact, preferred_element_type=jnp.float32)
    score = jnp.where(seen[:, None], score, HIDDEN)
    e = jnp.exp(score - score.max(axis=-1, keepdims=True))
    total, e = e.sum(axis=-1, keepdims=True), e.astype(cache.dtype)
    out = jnp.einsum("qhk,qkr->qhr", e, rows[..., : a.rank], precision=exact, preferred_element_type=jnp.float32)
    return (out / total).astype(q.dtype)
