"""Ragged paged attention: decode, prefill in chunks, and mixes of both. See kernel, validate, reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from polyradix.backend.protocol import AttnSpec, Heads
from polyradix_tpu.batch import JaxMeta, Shape, unpack
from polyradix_tpu.kernels.chip import LANES
from polyradix_tpu.kernels.ragged_paged_attention.kernel import call
from polyradix_tpu.kernels.ragged_paged_attention.sizes import ALIGN, Items
from polyradix_tpu.kernels.ragged_paged_attention.validate import plan, problems

__all__ = ["TILE", "attend", "problems", "samples"]

TILE = 128  # query rows that share one read of their keys, in prefill


def attend(
    q: jax.Array,
    kv: jax.Array,
    m: JaxMeta,
    a: AttnSpec,
    interpret: Any = False,
) -> jax.Array:
    """q [T,Hq,D] over kv [pages, page, 2*Hk, C] -> [T,Hq,D], with C at least D and zeros from D on. `a.sinks` is an
    array f32[Hq]. Raises ValueError for what `problems` names."""
    found = problems(q, kv, m.shape, a, interpret=bool(interpret))
    if found:
        raise ValueError("; ".join(found))
    wide = jnp.pad(q, ((0, 0), (0, 0), (0, kv.shape[3] - q.shape[2])))
    out = _attend(wide, kv, m, a, a.sinks, interpret)
    return out[:, :, : q.shape[2]]


def _attend(q: jax.Array, kv: jax.Array, m: JaxMeta, a: AttnSpec, sinks: jax.Array | None, interpret: Any) -> jax.Array:
    if m.shape.tile == 1:
        return _rows(q, kv, m, a, sinks, m.kv_len, interpret)
    alone = jnp.diff(m.cu_q) == 1
    rows = _rows(q[m.last], kv, m, a, sinks, jnp.where(alone, m.kv_len, 0), interpret)
    tiles = _tiles(q, kv, m, a, sinks, alone, interpret)
    seq = _sequences(m)
    return jnp.where(alone[seq][:, None, None], rows[seq], tiles)


def _rows(
    q: jax.Array, kv: jax.Array, m: JaxMeta, a: AttnSpec, sinks: jax.Array | None, keys: jax.Array, interpret: Any
) -> jax.Array:
    """q [S,Hq,D], the newest row of each sequence, over its first `keys` [S] -> [S,Hq,D]; 0 keys give zeros."""
    z, vmem = plan(kv, m.shape, a, 1)
    items = _items(m, a, z.page, jnp.arange(m.shape.seqs), keys - 1, keys, keys, keys)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks[None, :, None], (1, a.heads.q, LANES))
    out = call(z, q[:, None], _flat(kv), items, sinks, vmem, interpret)
    return out[:, 0]


def _tiles(
    q: jax.Array, kv: jax.Array, m: JaxMeta, a: AttnSpec, sinks: jax.Array | None, alone: jax.Array, interpret: Any
) -> jax.Array:
    """q [T,Hq,D] -> [T,Hq,D], of sequences that are not `alone` [S]; rows of others are anything.

    The kernel's rows are those of one sequence after another, each from a multiple of ALIGN on."""
    z, vmem = plan(kv, m.shape, a, m.shape.tile)
    tile, heads, group = m.shape.tile, a.heads, a.heads.q // a.heads.kv
    lengths = jnp.where(alone, 0, jnp.diff(m.cu_q))
    room = -(-lengths // ALIGN) * ALIGN
    shift = jnp.cumsum(room) - room - m.cu_q[:-1]  # from a sequence's rows in q to the kernel's
    rows, seq = jnp.arange(m.shape.tokens), _sequences(m)
    at, mine = rows + shift[seq], (lengths[seq] > 0) & (rows < m.cu_q[-1])
    height = -(-(m.shape.tokens + (ALIGN - 1) * m.shape.seqs) // ALIGN) * ALIGN + tile
    source = jnp.zeros(height, jnp.int32).at[jnp.where(mine, at, height)].set(rows, mode="drop")
    by_head = q[source].reshape(height, heads.kv, group, -1).transpose(1, 2, 0, 3)
    real = (m.tile_row > 0) | (jnp.arange(m.shape.tiles) == 0)  # those of padding are zero
    count = jnp.where(real, jnp.clip(m.cu_q[m.tile_seq + 1] - m.tile_row, 0, tile), 0)
    first = m.positions[m.tile_row]
    keys = jnp.where(real & ~alone[m.tile_seq], first + count, 0)
    if sinks is not None:
        sinks = jnp.broadcast_to(sinks.reshape(heads.kv, group, 1, 1), (heads.kv, group, tile, LANES))
        sinks = sinks.reshape(heads.kv, group * tile, LANES)
    items = _items(m, a, z.page, m.tile_seq, first, keys, m.tile_row + shift[m.tile_seq], count)
    out = call(z, by_head, _flat(kv), items, sinks, vmem, interpret)
    return out.transpose(2, 0, 1, 3).reshape(height, heads.q, -1)[jnp.where(mine, at, 0)]


def _sequences(m: JaxMeta) -> jax.Array:
    """The sequence of each row [T]; anything for padding."""
    return m.tile_seq[m.where // m.shape.tile]


def _items(m: JaxMeta, a: AttnSpec, page: int, seq: jax.Array, first: jax.Array, keys: jax.Array, *rows: Any) -> Items:
    """Items of sequences `seq` whose first row is at position `first` and whose last sees `keys` keys."""
    skip = 0 if a.window is None else jnp.maximum(first + 1 - a.window, 0) // page
    pages = jnp.where(keys > 0, -(-keys // page) - skip, 0)
    start = seq * m.shape.pages + skip
    return Items(m.pages.reshape(-1), start, pages, first - skip * page, keys - skip * page, *rows)


def _flat(kv: jax.Array) -> jax.Array:
    """[pages, page*2*Hk, D]: the same bytes, where `problems` finds nothing."""
    return kv.reshape(kv.shape[0], -1, kv.shape[3])


def samples() -> Iterator[tuple[str, Any, tuple[Any, ...], tuple[int, ...]]]:
    """(label, function, arguments without values, numbers of the donated ones) at serving shapes of one chip, over a
    GiB of cache: 64 sequences of up to 4096 tokens, decoding, and with 1024 tokens of prompts among them."""
    models = {
        "Llama-3.1-8B tp=4": AttnSpec(Heads(8, 2, 128), 128**-0.5),
        "Llama-3.1-8B tp=1": AttnSpec(Heads(32, 8, 128), 128**-0.5),
        "Qwen2.5-7B tp=4": AttnSpec(Heads(7, 1, 128), 128**-0.5),
        "gemma-2-2b tp=1": AttnSpec(Heads(8, 4, 256), 256**-0.5, window=4096, softcap=50.0),
        "gpt-oss-20b tp=4": AttnSpec(Heads(16, 2, 64), 64**-0.5, window=128),
    }
    for label, a in models.items():
        sinks = [jax.ShapeDtypeStruct((a.heads.q,), jnp.float32)] if "gpt" in label else []
        for step, shape in ("decode", Shape(64, 64, 256, 1)), ("mixed", Shape(1024, 64, 256, TILE)):
            width = -(-a.heads.dim // LANES) * LANES
            pages = (1 << 30) // (16 * 2 * a.heads.kv * width * 2)
            args = (
                jax.ShapeDtypeStruct((shape.tokens, a.heads.q, a.heads.dim), jnp.bfloat16),
                jax.ShapeDtypeStruct((pages, 16, 2 * a.heads.kv, width), jnp.bfloat16),
                jax.ShapeDtypeStruct((shape.length,), jnp.int32),
                *sinks,
            )
            yield f"{label} {step}", partial(_sample, shape, a), args, ()


def _sample(
    shape: Shape, a: AttnSpec, q: jax.Array, kv: jax.Array, vector: jax.Array, sinks: jax.Array | None = None
) -> jax.Array:
    return attend(q, kv, unpack(vector, shape), replace(a, sinks=sinks))
