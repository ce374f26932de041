"""Rows of keys and values go to their slots by DMA, from HBM to HBM: nothing passes through a core."""

from __future__ import annotations

from functools import reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

RUN = 8  # neighbouring rows for neighbouring slots, as prefill has them, go in one copy
Ref: TypeAlias = Any


def kernel(slots: Ref, count: Ref, rows: Ref, _: Ref, out: Ref, sem: Ref) -> None:
    def copy(row: Any, size: int) -> Any:
        return pltpu.make_async_copy(rows.at[pl.ds(row, size)], out.at[pl.ds(slots[row], size)], sem)

    def run(i: Any, _: None) -> None:
        first = i * RUN
        whole = reduce(jnp.logical_and, (slots[first + n] == slots[first] + n for n in range(1, RUN)))
        pl.when(whole)(copy(first, RUN).start)
        pl.when(~whole)(lambda: single(first, first + RUN))

    def single(start: Any, stop: Any) -> None:
        lax.fori_loop(start, stop, lambda row, _: copy(row, 1).start(), None)

    n = count[0]
    runs = n // RUN
    lax.fori_loop(0, runs, run, None)
    single(runs * RUN, n)
    lax.fori_loop(0, n, lambda _, __: copy(0, 1).wait(), None)  # the semaphore counts bytes, however they were sent


def call(rows: jax.Array, slots: jax.Array, count: jax.Array, kv: jax.Array, interpret: Any) -> jax.Array:
    """rows [T,2*Hk,D], of which `count` [1] count, into `slots` [T] of kv [pages*page, 2*Hk, D], the same array."""
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    size = rows.size * rows.dtype.itemsize
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
        ),
        out_shape=jax.ShapeDtypeStruct(kv.shape, kv.dtype),
        input_output_aliases={3: 0},
        compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * size),
        name="kv_write",
        interpret=interpret,
    )(slots, count, rows, kv)
