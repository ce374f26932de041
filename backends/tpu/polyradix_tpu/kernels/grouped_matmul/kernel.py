"""Grouped matmul on the MXU: the grid's steps are the pairs of a tile of rows and a group with rows in that tile."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polyradix_tpu.kernels.grouped_matmul.validate import VMEM, Blocks
from polyradix_tpu.kernels.xla import precision

Ref: TypeAlias = Any
TRANSPOSED = (((1,), (1,)), ((), ()))


class Plan(NamedTuple):
    """What each step works on, all i32 [most steps]; entries from `steps` on mean nothing."""

    tile: jax.Array
    group: jax.Array
    first: jax.Array  # row of the tile where the group starts, 0 if it started before
    stop: jax.Array  # row of the tile where the group ends, at most the tile's; 0 for the rows that no group has
    steps: jax.Array  # how many, i32 []


def plan(group_sizes: jax.Array, rows: int, tile: int) -> Plan:
    """Steps in the order of rows. The rows that no group has count as one more group, so that every tile is visited."""
    groups, tiles = len(group_sizes), pl.cdiv(rows, tile)
    ends = jnp.cumsum(group_sizes.astype(jnp.int32))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    ends = jnp.concatenate([ends, jnp.full(1, tiles * tile, jnp.int32)])
    visits = jnp.where(ends > starts, -(-ends // tile) - starts // tile, 0)
    until = jnp.cumsum(visits)
    step = jnp.arange(tiles + groups)
    group = jnp.minimum(jnp.sum(until <= step[:, None], axis=1), groups)
    at = starts[group] // tile + step - (until - visits)[group]
    last = jnp.max(jnp.where(group_sizes > 0, jnp.arange(groups), 0))  # whose weights are there already
    stop = jnp.where(group < groups, jnp.minimum(ends[group] - at * tile, tile), 0)
    first = jnp.maximum(starts[group] - at * tile, 0)
    return Plan(at, jnp.minimum(group, last), first, stop, until[-1])


def _kernel(size: int, tile: Ref, group: Ref, first: Ref, stop: Ref, lhs: Ref, rhs: Ref, out: Ref) -> None:
    """Parts of `size` rows, as many as the group touches: all of a part is computed, and the group's rows are kept."""
    step = pl.program_id(1)
    start, end = first[step], stop[step]

    def part(i: Any, _: None) -> None:
        rows = pl.ds(pl.multiple_of(i * size, size), size)
        product = lax.dot_general(
            lhs[rows], rhs[...], TRANSPOSED, precision=precision(lhs.dtype), preferred_element_type=jnp.float32
        )
        row = lax.broadcasted_iota(jnp.int32, product.shape, 0) + i * size
        mine = (row >= start) & (row < end)
        out[rows] = jnp.where(mine, product.astype(out.dtype), out[rows])

    def clear() -> None:
        out[...] = jnp.zeros_like(out)

    pl.when(start == 0)(clear)  # the first step at this tile
    lax.fori_loop(start // size, pl.cdiv(end, size), part, None)


def call(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, blocks: Blocks, interpret: Any) -> jax.Array:
    """See the package."""
    (rows, inner), columns = lhs.shape, rhs.shape[1]
    p = plan(group_sizes, rows, blocks.rows)
    out: jax.Array = pl.pallas_call(
        partial(_kernel, blocks.part),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(columns, blocks.columns), p.steps),
            in_specs=[
                pl.BlockSpec((blocks.rows, inner), lambda n, s, tile, *_: (tile[s], 0)),
                pl.BlockSpec((None, blocks.columns, inner), lambda n, s, tile, group, *_: (group[s], n, 0)),
            ],
            out_specs=pl.BlockSpec((blocks.rows, blocks.columns), lambda n, s, tile, *_: (tile[s], n)),
        ),
        out_shape=jax.ShapeDtypeStruct((rows, columns), lhs.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM + (4 << 20)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * columns,
            transcendentals=0,
            bytes_accessed=(lhs.size + rhs.size + rows * columns) * lhs.dtype.itemsize,
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*p[:4], lhs, rhs)
    return out
