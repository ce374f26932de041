"""Ragged paged attention: decode, prefill in chunks, and mixes of both. See kernel, validate, reference."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from polyradix.backend.protocol import AttnSpec
from polyradix_tpu.batch import JaxMeta
from polyradix_tpu.kernels.ragged_paged_attention.kernel import LANES, Items, call
from polyradix_tpu.kernels.ragged_paged_attention.validate import plan, problems

__all__ = ["TILE", "attend", "problems"]

TILE = 128  # query rows that share one read of their keys, in prefill


def attend(
    q: jax.Array,
    kv: jax.Array,
    m: JaxMeta,
    a: AttnSpec,
    sinks: jax.Array | None = None,
    interpret: Any = False,
) -> jax.Array:
    """q [T,Hq,D] over kv [pages, page, 2*Hk, C] -> [T,Hq,D], with C at least D and zeros from D on. `sinks` f32[Hq]:
    per query head, the score of one key more, whose value is zero. Raises ValueError for what `problems` names."""
    found = problems(q, kv, m.shape, a, interpret=bool(interpret))
    if found:
        raise ValueError("; ".join(found))
    wide = jnp.pad(q, ((0, 0), (0, 0), (0, kv.shape[3] - q.shape[2])))
    out = _attend(wide, kv, m, a, sinks, interpret)
    return out[:, :, : q.shape[2]]


def _attend(q: jax.Array, kv: jax.Array, m: JaxMeta, a: AttnSpec, sinks: jax.Array | None, interpret: Any) -> jax.Array:
    if m.shape.tile == 1:
        return _rows(q, kv, m, a, sinks, m.kv_len, interpret)
    alone = jnp.diff(m.cu_q) == 1
    rows = _rows(q[m.last], kv, m, a, sinks, jnp.where(alone, m.kv_len, 0), interpret)
    tiles = _tiles(q, kv, m, a, sinks, ~alone, interpret)
    seq = m.tile_seq[m.where // m.shape.tile]
    return jnp.where(alone[seq][:, None, None], rows[seq], tiles[m.where])


def _rows(
    q: jax.Array, kv: jax.Array, m: JaxMeta, a: AttnSpec, sinks: jax.Array | None, keys: jax.Array, interpret: Any
) -> jax.Array:
    """q [S,Hq,D], the newest row of each sequence, over its first `keys` [S] -> [S,Hq,D]; 0 keys give zeros."""
    z, vmem = plan(kv, m.shape, a, 1)
    items = _items(m, a, z.page, jnp.arange(m.shape.seqs), keys - 1, keys)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks[None, :, None], (1, a.heads.q, LANES))
    out = call(z, q[:, None], _flat(kv), items, sinks, vmem, interpret)
    return out[:, 0]


def _tiles(
    q: jax.Array, kv: jax.Array, m: JaxMeta, a: AttnSpec, sinks: jax.Array | None, wanted: jax.Array, interpret: Any
) -> jax.Array:
    """q [T,Hq,D] -> rows of all tiles [tiles*tile,Hq,D], of sequences `wanted` [S]; zeros for others."""
    z, vmem = plan(kv, m.shape, a, m.shape.tile)
    tile, heads = m.shape.tile, a.heads
    each, group = jnp.arange(m.shape.tiles), heads.q // heads.kv
    real = (m.tile_row > 0) | (each == 0)  # those of padding are zero
    count = jnp.minimum(m.cu_q[m.tile_seq + 1] - m.tile_row, tile)
    first = m.positions[m.tile_row]
    keys = jnp.where(real & wanted[m.tile_seq], first + count, 0)
    at = jnp.minimum(m.tile_row[:, None] + jnp.arange(tile), m.shape.tokens - 1)
    split = q[at].reshape(-1, tile, heads.kv, group, q.shape[2]).transpose(0, 2, 3, 1, 4)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.reshape(heads.kv, group, 1, 1), (heads.kv, group, tile, LANES))
        sinks = sinks.reshape(heads.kv, group * tile, LANES)
    items = _items(m, a, z.page, m.tile_seq, first, keys)
    rows = split.reshape(len(each), heads.kv, group * tile, -1)
    out = call(z, rows, _flat(kv), items, sinks, vmem, interpret)
    return out.reshape(split.shape).transpose(0, 3, 1, 2, 4).reshape(-1, heads.q, q.shape[2])


def _items(m: JaxMeta, a: AttnSpec, page: int, seq: jax.Array, first: jax.Array, keys: jax.Array) -> Items:
    """Items of sequences `seq` whose first row is at position `first` and whose last sees `keys` keys."""
    skip = 0 if a.window is None else jnp.maximum(first + 1 - a.window, 0) // page
    pages = jnp.where(keys > 0, -(-keys // page) - skip, 0)
    return Items(m.pages.reshape(-1), seq * m.shape.pages + skip, pages, first - skip * page, keys - skip * page)


def _flat(kv: jax.Array) -> jax.Array:
    """[pages, page*2*Hk, D]: the same bytes, where `problems` finds nothing."""
    return kv.reshape(kv.shape[0], -1, kv.shape[3])
