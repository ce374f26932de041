"""Grouped matmul on the MXU: the grid's steps are the pairs of a tile of rows and a group with rows in that tile."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polyradix_tpu.kernels.grouped_matmul.validate import Blocks
from polyradix_tpu.kernels.xla import precision


class Plan(NamedTuple):
    """What each step works on, all i32 [most steps]; entries from `steps` on mean nothing."""

    tile: jax.Array
    group: jax.Array
    first: jax.Array  # row of the tile where the group starts, 0 if it started before
    stop: jax.Array  # row of the tile where the group ends; not after `first` for the rows that no group has
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
    stop = jnp.where(group < groups, ends[group], 0) - at * tile
    first = jnp.maximum(starts[group] - at * tile, 0)
    return Plan(at, jnp.minimum(group, last), first, stop, until[-1])


def _kernel(tile: Any, group: Any, first: Any, stop: Any, lhs: Any, rhs: Any, out: Any) -> None:
    step = pl.program_id(1)
    row = jax.lax.broadcasted_iota(jnp.int32, out.shape, 0)
    before = row < first[step]  # of earlier steps at this tile; what comes after the group is written by later ones

    @pl.when(stop[step] > first[step])
    def _() -> None:
        product = jax.lax.dot_general(
            lhs[...],
            rhs[...],
            (((1,), (1,)), ((), ())),
            precision=precision(lhs.dtype),
            preferred_element_type=jnp.float32,
        )
        mine = jnp.where(row < stop[step], product, 0).astype(out.dtype)
        out[...] = jnp.where(before, out[...], mine)

    @pl.when(stop[step] <= first[step])
    def _() -> None:
        out[...] = jnp.where(before, out[...], 0)


def call(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, blocks: Blocks, vmem: int, interpret: Any) -> Any:
    """See the package. `vmem`: bytes that the kernel may use."""
    (rows, inner), columns = lhs.shape, rhs.shape[1]
    p = plan(group_sizes, rows, blocks.rows)
    return pl.pallas_call(
        _kernel,
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
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows * inner * columns,
            transcendentals=0,
            bytes_accessed=(lhs.size + rhs.size + rows * columns) * lhs.dtype.itemsize,
        ),
        interpret=interpret,
        name="grouped_matmul",
    )(*p[:4], lhs, rhs)
