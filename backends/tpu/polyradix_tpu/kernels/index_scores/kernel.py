"""Scores of an indexer, a tile of queries at a time. Keys are fetched by DMA while those before them are met."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polyradix_tpu.kernels.chip import LANES, lanes
from polyradix_tpu.kernels.index_scores.validate import VMEM
from polyradix_tpu.kernels.xla import precision

Ref: TypeAlias = Any


class Sizes(NamedTuple):
    tile: int
    heads: int
    pages: int  # of a tile, in the page table
    keys: int
    column: int  # of the cache, that is fetched first
    skip: int  # columns fetched before the keys'


def _move(cache: Ref, held: Ref, sem: Ref, pages: Ref, at: Any, count: Any, column: int, wait: bool = False) -> None:
    """Starts copies of `count` pages, from entry `at` of the table on, or waits for them."""

    def one(i: Any, _: None) -> None:
        source = cache.at[pages[at + i], :, pl.ds(column, held.shape[2])]
        copy = pltpu.make_async_copy(source, held.at[i], sem)
        copy.wait() if wait else copy.start()

    lax.fori_loop(0, count, one, None)


def _kernel(
    z: Sizes, pages: Ref, until: Ref, index: Ref, weights: Ref, cache: Ref, out: Ref, held: Ref, wide: Ref, sem: Ref
) -> None:
    tile = pl.program_id(0)
    blocks, dim = pl.cdiv(until[tile], z.keys), index.shape[2]

    def rows(block: Any, wait: bool = False) -> None:
        each, page = held.shape[1:3]
        count = jnp.minimum(pl.cdiv(until[tile] - block * z.keys, page), each)
        slot = block % 2
        _move(cache, held.at[slot], sem.at[slot], pages, tile * z.pages + block * each, count, z.column, wait)

    def meet(block: Any, _: None) -> None:
        pl.when(block + 1 < blocks)(lambda: rows(block + 1))
        rows(block, wait=True)
        keys = held[block % 2].reshape(z.keys, -1)[:, z.skip : z.skip + dim]
        at = pl.ds(pl.multiple_of(block * z.keys, z.keys), z.keys)
        out[0, :, at] = _scores(z, index[0], keys, wide[:, :1])

    rows(0)
    for q in range(z.tile):  # a query's weights from lanes to sublanes
        row = jnp.broadcast_to(weights[0, q : q + 1], (LANES, weights.shape[2]))
        wide[q * z.heads : (q + 1) * z.heads] = row.T[: z.heads]
    lax.fori_loop(0, blocks, meet, None)


def _scores(z: Sizes, index: jax.Array, keys: jax.Array, weights: jax.Array) -> jax.Array:
    """index [tile*heads,dim], keys [keys,dim], weights [tile*heads,1] -> [tile,keys]"""
    dims, exact = (((1,), (1,)), ((), ())), precision(keys.dtype)
    each = lax.dot_general(index, keys, dims, precision=exact, preferred_element_type=jnp.float32)
    return jnp.sum((jnp.maximum(each, 0) * weights).reshape(z.tile, z.heads, z.keys), axis=1)


def call(
    index: jax.Array,
    weights: jax.Array,
    cache: jax.Array,
    pages: jax.Array,
    until: jax.Array,
    first: int,
    keys: int,
    interpret: Any,
) -> jax.Array:
    """See the package."""
    (tiles, tile, heads, dim), (_, page, width) = index.shape, cache.shape
    skip, rows, context = first % LANES, tile * heads, pages.shape[1] * page
    columns = min(lanes(skip + dim), width - (first - skip))
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, lanes(heads) - heads)))
    return pl.pallas_call(
        partial(_kernel, Sizes(tile, heads, pages.shape[1], keys, first - skip, skip)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(tiles,),
            in_specs=[
                pl.BlockSpec((1, rows, dim), lambda i, *_: (i, 0, 0)),
                pl.BlockSpec((1, tile, weights.shape[2]), lambda i, *_: (i, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=pl.BlockSpec((1, tile, context), lambda i, *_: (i, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((2, keys // page, page, columns), cache.dtype),
                pltpu.VMEM((rows, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((tiles, tile, context), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM + (4 << 20), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="index_scores",
    )(pages.reshape(-1), until, index.reshape(tiles, rows, dim), weights, cache)
