"""The same in plain XLA: pages are gathered, tile by tile, and a masked softmax covers all of a bucket's context."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from polyradix_tpu.batch import JaxMeta
from polyradix_tpu.kernels.xla import BUDGET, HIDDEN, precision


def attend(q: jax.Array, latent: int, cache: jax.Array, m: JaxMeta, scale: float) -> tuple[jax.Array, jax.Array]:
    """q [T,H,R+Dr]; otherwise as kernel.call, always with the logs. Tiles take turns if all need more than BUDGET."""
    context = m.shape.pages * cache.shape[1]
    one = context * (cache.shape[2] * cache.dtype.itemsize + 4 * q.shape[1] * m.shape.tile)
    each = max(1, min(m.shape.tiles, BUDGET // one))
    turns = -(-m.shape.tiles // each)
    rows, seqs = (jnp.pad(x, (0, turns * each - len(x))).reshape(turns, each) for x in (m.tile_row, m.tile_seq))

    def some(at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return _tiles(*at, q, latent, cache, m, scale)

    out, lse = jax.lax.map(some, (rows, seqs))
    return out.reshape(-1, *out.shape[3:])[m.where], lse.reshape(-1, lse.shape[-1])[m.where]


def _tiles(
    first: jax.Array, seqs: jax.Array, q: jax.Array, latent: int, cache: jax.Array, m: JaxMeta, scale: float
) -> tuple[jax.Array, jax.Array]:
    """The tiles that start at rows `first` [C] of sequences `seqs` [C] -> [C,tile,H,latent], [C,tile,H]."""
    row = jnp.minimum(first[:, None] + jnp.arange(m.shape.tile), m.shape.tokens - 1)  # [C,tile]
    held = cache[m.pages[seqs]].reshape(len(seqs), -1, cache.shape[2])[..., : q.shape[2]]
    at, exact = jnp.arange(held.shape[1]), precision(cache.dtype)
    held = jnp.where((at < m.kv_len[seqs, None])[..., None], held, 0)  # rows that nobody wrote may be NaN
    score = scale * jnp.einsum("cqhw,ckw->cqhk", q[row], held, precision=exact, preferred_element_type=jnp.float32)
    score = jnp.where(at <= m.positions[row][:, :, None, None], score, HIDDEN)
    top = jnp.max(score, axis=-1)
    e = jnp.exp(score - top[..., None])
    total, e = jnp.sum(e, axis=-1), e.astype(cache.dtype)
    out = jnp.einsum("cqhk,ckr->cqhr", e, held[..., :latent], precision=exact, preferred_element_type=jnp.float32)
    return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)
