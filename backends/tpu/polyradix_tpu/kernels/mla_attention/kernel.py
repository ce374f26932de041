"""Attention over latent rows: a tile of queries at a time, keys fetched ahead by DMA, across tiles as well."""

from __future__ import annotations

from math import e, log, log2
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polyradix_tpu.batch import JaxMeta
from polyradix_tpu.kernels.mla_attention.validate import LANES, Blocks
from polyradix_tpu.kernels.xla import HIDDEN, precision


class Plan(NamedTuple):
    """What each tile needs, i32 [tiles] unless said; what comes after the batch's last tile means nothing."""

    pages: jax.Array  # [S*P]
    seq: jax.Array
    first: jax.Array  # position of its first query
    keys: jax.Array  # that its last query sees
    turn: jax.Array  # blocks of keys that earlier tiles fetched


def plan(m: JaxMeta, keys: int) -> tuple[Plan, jax.Array]:
    """And how many tiles there are."""
    first = m.positions[m.tile_row]
    bound = jnp.minimum(m.kv_len[m.tile_seq], first + m.shape.tile)
    blocks = pl.cdiv(bound, keys)
    p = Plan(m.pages.reshape(-1), m.tile_seq, first, bound, jnp.cumsum(blocks) - blocks)
    return p, jnp.max(m.where) // m.shape.tile + 1


class _Kernel:
    """The sizes that are known when it is traced. Scores are in units of log 2."""

    def __init__(self, pages: int, heads: int, latent: int, scale: float, blocks: Blocks) -> None:
        self.pages, self.heads, self.latent, self.blocks = pages, heads, latent, blocks
        self.scale = scale * log2(e)

    def __call__(self, *refs: Any) -> None:
        p, (q, cache, out, *lse), (held, arrived, top, total, acc) = Plan(*refs[:5]), refs[5:-5], refs[-5:]
        tile, keys = pl.program_id(0), self.blocks.keys
        first, bound, turn = p.first[tile], p.keys[tile], p.turn[tile]
        count = pl.cdiv(bound, keys)

        def fetch(tile: Any, block: Any, slot: Any, wait: bool) -> None:
            page = held.shape[2]
            at = p.seq[tile] * self.pages + block * held.shape[1]

            @pl.loop(0, jnp.minimum(held.shape[1], pl.cdiv(p.keys[tile] - block * keys, page)))
            def _(i: Any) -> None:
                copy = pltpu.make_async_copy(cache.at[p.pages[at + i]], held.at[slot, i], arrived.at[slot])
                copy.wait() if wait else copy.start()

        @pl.when(tile == 0)
        def _() -> None:
            fetch(0, 0, 0, wait=False)

        top[...] = jnp.full_like(top, HIDDEN)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

        def meet(block: Any, masked: bool) -> None:
            slot = (turn + block) % 2
            more = block + 1 < count
            then = jnp.where(more, tile, tile + 1)

            @pl.when(then < pl.num_programs(0))
            def _() -> None:
                fetch(then, jnp.where(more, block + 1, 0), 1 - slot, wait=False)

            fetch(tile, block, slot, wait=True)
            rows = held[slot].reshape(keys, -1)
            if masked:  # rows that nobody wrote may be NaN
                at = jax.lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
                rows = jnp.where(at < bound - block * keys, rows, jnp.zeros_like(rows))

            @pl.loop(0, q.shape[1] // (self.blocks.queries * self.heads))
            def _(i: Any) -> None:
                self._step(i, rows, first - block * keys if masked else None, q, top, total, acc)

        clear = (first + 1) // keys  # blocks that every query of the tile sees all of
        pl.loop(0, clear)(lambda block: meet(block, masked=False))
        pl.loop(clear, count)(lambda block: meet(block, masked=True))
        out[0] = (acc[...] / total[:, :1]).astype(out.dtype)
        for x in lse:
            x[0] = (top[:, :1] + jnp.log2(total[:, :1])) * log(2)

    def _step(self, i: Any, rows: jax.Array, first: Any, q: Any, top: Any, total: Any, acc: Any) -> None:
        """Queries of group i meet the keys `rows`; query 0 sees those up to number `first`, all if None."""
        size, exact = self.blocks.queries * self.heads, precision(rows.dtype)
        mine = pl.ds(i * size, size)
        score = jax.lax.dot_general(
            q[0, mine], rows, (((1,), (1,)), ((), ())), precision=exact, preferred_element_type=jnp.float32
        )
        score *= self.scale
        if first is not None:
            query = jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0) // self.heads + i * self.blocks.queries
            key = jax.lax.broadcasted_iota(jnp.int32, score.shape, 1)
            score = jnp.where(key <= first + query, score, HIDDEN)
        old = top[mine, :1]
        new = jnp.maximum(old, jnp.max(score, axis=1, keepdims=True))
        p = jnp.exp2(score - new)
        fade = jnp.exp2(old - new)
        part = jax.lax.dot_general(
            p.astype(rows.dtype),
            rows[:, : self.latent],
            (((1,), (0,)), ((), ())),
            precision=exact,
            preferred_element_type=jnp.float32,
        )
        acc[mine] = acc[mine] * fade + part
        sums = total[mine, :1] * fade + jnp.sum(p, axis=1, keepdims=True)
        total[mine] = jnp.broadcast_to(sums, (size, LANES))
        top[mine] = jnp.broadcast_to(new, (size, LANES))


def call(
    q: jax.Array, latent: int, cache: jax.Array, m: JaxMeta, scale: float, blocks: Blocks, vmem: int, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """q [T,H,W] as wide as the cache -> [T,H,latent] in its dtype, and the log of the sum of exponentials, f32[T,H].
    `vmem`: bytes that the kernel may use."""
    p, tiles = plan(m, blocks.keys)
    heads, (_, page, wide) = q.shape[1], cache.shape
    row = jnp.minimum(m.tile_row[:, None] + jnp.arange(m.shape.tile), m.shape.tokens - 1)
    rows, dtype = m.shape.tile * heads, q.dtype
    out, lse = pl.pallas_call(
        _Kernel(m.shape.pages, heads, latent, scale, blocks),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(p),
            grid=(tiles,),
            in_specs=[
                pl.BlockSpec((1, rows, wide), lambda i, *_: (i, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=[pl.BlockSpec((1, rows, n), lambda i, *_: (i, 0, 0)) for n in (latent, 1)],
            scratch_shapes=[
                pltpu.VMEM((2, blocks.keys // page, page, wide), dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.VMEM((rows, latent), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((m.shape.tiles, rows, latent), dtype),
            jax.ShapeDtypeStruct((m.shape.tiles, rows, 1), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=vmem),
        interpret=interpret,
        name="mla_attention",
    )(*p, q[row].reshape(-1, rows, wide), cache)
    return out.reshape(-1, heads, latent)[m.where], lse.reshape(-1, heads)[m.where]
