"""Attention in plain XLA: pages are gathered, tile by tile, and a masked softmax covers all of a bucket's context."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from polyradix.backend.protocol import FLOAT8_MAX, AttnSpec
from polyradix_tpu.batch import JaxMeta

BUDGET = 1 << 27  # bytes of gathered keys and scores at once, beyond which tiles take turns
RUN = 8  # columns of a float32 query and key that are summed as one
HIDDEN = -1e30  # the score of a key out of sight: finite, so that a row that sees nothing is not NaN


def precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """Products of float32 values in full."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


def write(k: jax.Array, v: jax.Array, kv: jax.Array, m: JaxMeta) -> jax.Array:
    """k and v [T,Hk,D] into their slots of kv [pages, page, 2*Hk, C], C >= D; in place where kv is donated."""
    if kv.dtype == jnp.float8_e4m3fn:
        k, v = (jnp.clip(x.astype(jnp.float32), -FLOAT8_MAX, FLOAT8_MAX) for x in (k, v))
    rows = jnp.stack([k, v], axis=2).reshape(len(k), kv.shape[2], k.shape[2])
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, kv.shape[3] - k.shape[2])))
    page = kv.shape[1]
    return kv.at[m.slots // page, m.slots % page].set(rows.astype(kv.dtype))


def write_rows(rows: jax.Array, kv: jax.Array, m: JaxMeta) -> jax.Array:
    """rows [T,N] into their slots of kv [pages, page, W], W >= N; in place where kv is donated."""
    rows, page = jnp.pad(rows, ((0, 0), (0, kv.shape[2] - rows.shape[1]))), kv.shape[1]
    return kv.at[m.slots // page, m.slots % page].set(rows.astype(kv.dtype))


def attend(q: jax.Array, kv: jax.Array, m: JaxMeta, a: AttnSpec) -> jax.Array:
    """q [T,Hq,D] over kv [pages, page, 2*Hk, C], C >= D -> [T,Hq,D]."""
    context = m.shape.pages * kv.shape[1]
    scores = 4 * a.heads.q * m.shape.tile * _runs(a.heads.dim, q.dtype)
    one = context * (2 * a.heads.kv * a.heads.dim * q.dtype.itemsize + scores)
    group = max(1, min(m.shape.tiles, BUDGET // one))
    groups = -(-m.shape.tiles // group)
    rows, seqs = (jnp.pad(x, (0, groups * group - len(x))).reshape(groups, group) for x in (m.tile_row, m.tile_seq))

    def some(at: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _tiles(*at, q, kv, m, a)

    out = some((rows[0], seqs[0])) if groups == 1 else jax.lax.map(some, (rows, seqs))
    return out.reshape(-1, *q.shape[1:])[m.where]


def _runs(dim: int, dtype: jnp.dtype) -> int:
    """Into how many sums a score is taken apart. cuBLAS adds 64 float32 products one after the other, and then a score
    alone may be 1.6 times the rounding floor off; by 8 it is 0.5."""
    return dim // RUN if dtype == jnp.float32 and dim % RUN == 0 else 1


def _tiles(first: jax.Array, seqs: jax.Array, q: jax.Array, kv: jax.Array, m: JaxMeta, a: AttnSpec) -> jax.Array:
    """The tiles that start at rows `first` [C] of sequences `seqs` [C] -> [C*tile,Hq,D]."""
    heads, exact = a.heads, precision(q.dtype)
    rows = jnp.minimum(first[:, None] + jnp.arange(m.shape.tile), m.shape.tokens - 1)  # [C,tile]
    group = q[rows].reshape(*rows.shape, heads.kv, heads.q // heads.kv, heads.dim)
    held = kv[m.pages[seqs]][..., : heads.dim].astype(q.dtype).reshape(len(seqs), -1, heads.kv, 2, heads.dim)
    at = jnp.arange(held.shape[1])
    keys, values = held[..., 0, :], held[..., 1, :]
    known = at < m.kv_len[seqs][:, None]
    if a.window is not None:
        known &= at > m.positions[rows[:, :1]] - a.window
    values = jnp.where(known[:, :, None, None], values, 0)  # 0 * garbage may be NaN
    runs = _runs(heads.dim, q.dtype)
    group, keys = (x.reshape(*x.shape[:-1], runs, heads.dim // runs) for x in (group, keys))
    score = jnp.einsum("cqhgsd,ckhsd->schgqk", group, keys, precision=exact, preferred_element_type=jnp.float32)
    score = score.sum(axis=0) * a.scale
    if a.softcap is not None:
        score = a.softcap * jnp.tanh(score / a.softcap)
    mine = m.positions[rows][:, None, None, :, None]
    seen = at <= mine
    if a.window is not None:
        seen &= at > mine - a.window
    score = jnp.where(seen, score, HIDDEN)
    top = score.max(axis=-1, keepdims=True)
    sinks = None if a.sinks is None else a.sinks.reshape(1, heads.kv, -1, 1, 1)
    top = top if sinks is None else jnp.maximum(top, sinks)
    p = jnp.exp(score - top)
    total = p.sum(axis=-1) if sinks is None else p.sum(axis=-1) + jnp.exp(sinks - top)[..., 0]
    total = total.transpose(0, 3, 1, 2)[..., None]
    out = jnp.einsum(
        "chgqk,ckhd->cqhgd", p.astype(q.dtype), values, precision=exact, preferred_element_type=jnp.float32
    )
    return (out / total).astype(q.dtype).reshape(-1, heads.q, heads.dim)
