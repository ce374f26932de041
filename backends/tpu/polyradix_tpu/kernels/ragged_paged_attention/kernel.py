"""Attention over the paged cache in Pallas: blocks of pages stream through VMEM and a softmax runs over them.

An item is up to `tile` neighbouring query rows of one sequence. There are two ways to read a block of its cache
[tokens*2*Hk, D], whose rows are key and value of head 0, of head 1 and so on:

* flat, for single rows (decode): only keys and values are taken apart. All query heads meet the keys of all heads, and
  those of other heads than the query's own count as out of sight. The matrix unit, idle in decode, does Hk times the
  work.
* split, for tiles (prefill): keys and values of one head after another are taken out of the block, to do no more work
  than there is. Query rows come and go by DMA, as many as there are.
"""

from __future__ import annotations

from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polyradix_tpu.kernels.chip import LANES
from polyradix_tpu.kernels.ragged_paged_attention.sizes import ALIGN, Items, Sizes
from polyradix_tpu.kernels.ragged_paged_attention.softmax import Softmax, keys_values, unpack
from polyradix_tpu.kernels.ragged_paged_attention.stream import Stream

Ref: TypeAlias = Any
INPUTS = 7  # arrays of Items


def _blocks(z: Sizes, s: Stream, state: Softmax, i: Any, q: Ref, offsets: Ref, sinks: Ref | None, words: Ref) -> None:
    """Item i with its rows q [parts,...,D], all of its blocks, into `state`."""
    parts, dim = q.shape[0], q.shape[-1]

    def block(b: Any, _: None) -> None:
        rows, past = s.read(i, b), b * z.tokens
        limit = s.m.keys[i] - past
        if words is not None:
            unpack(z, rows, words, limit)

        def one(part: Any, _: None) -> None:
            k, v = keys_values(z, rows, words, limit, part)
            state.add(part, q[part].reshape(-1, dim), k, v, offsets, s.m.query[i] - past)

        lax.fori_loop(0, parts, one, None)

    state.begin(sinks)
    lax.fori_loop(0, pl.cdiv(s.m.pages[i], z.block), block, None)


def flat(z: Sizes, per_core: int, sink: bool, *refs: Ref) -> None:
    """Every grid step has z.items rows q and out [items,1,Hq,D]."""
    m, (q, offsets, kv), rest = Items(*refs[:INPUTS]), refs[INPUTS : INPUTS + 3], list(refs[INPUTS + 3 :])
    sinks = rest.pop(0) if sink else None
    out, buf, sem, cursor, top, total, acc, *words = rest
    first = pl.program_id(0) * per_core
    s, state = Stream(z, m, kv, buf, sem, cursor, first + per_core, 1), Softmax(z, top, total, acc)
    pl.when(pl.program_id(1) == 0)(lambda: s.begin(first))

    def item(row: Any, _: None) -> None:
        i = first + pl.program_id(1) * z.items + row
        _blocks(z, s, state, i, q.at[row], offsets, sinks, words[0] if words else None)
        out[row] = state.result().astype(out.dtype)

    lax.fori_loop(0, z.items, item, None)


def split(z: Sizes, count: int, sink: bool, *refs: Ref) -> None:
    """q and out [Hk,G,rows,D] are in HBM. While an item is computed, the next one's rows come and the last one's go."""
    m, (q, offsets, kv), rest = Items(*refs[:INPUTS]), refs[INPUTS : INPUTS + 3], list(refs[INPUTS + 3 :])
    sinks = rest.pop(0) if sink else None
    out, buf, sem, cursor, top, total, acc, words, come, go, moves = rest
    s, state = Stream(z, m, kv, buf, sem, cursor, count, z.cores), Softmax(z, top, total, acc)

    def coming(i: Any, slot: Any) -> Any:
        rows = pl.ds(pl.multiple_of(m.at[i], ALIGN), z.tile)
        return pltpu.make_async_copy(q.at[:, :, rows], come.at[slot], moves.at[slot])

    def going(i: Any, n: Any) -> Any:
        rows = pl.ds(pl.multiple_of(m.at[i] + n * ALIGN, ALIGN), ALIGN)
        return pltpu.make_async_copy(go.at[:, :, pl.ds(n * ALIGN, ALIGN)], out.at[:, :, rows], moves.at[2])

    def gone(i: Any) -> None:
        lax.fori_loop(0, pl.cdiv(m.count[i], ALIGN), lambda n, _: going(i, n).wait(), None)

    def item(at: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        i, last, slot = at
        ahead = s.busy(i + z.cores)
        pl.when(ahead < count)(lambda: coming(ahead, 1 - slot).start())
        coming(i, slot).wait()
        _blocks(z, s, state, i, come.at[slot], offsets, sinks, words)
        pl.when(last < count)(lambda: gone(last))
        go[...] = state.result().astype(go.dtype).reshape(go.shape)
        lax.fori_loop(0, pl.cdiv(m.count[i], ALIGN), lambda n, _: going(i, n).start(), None)
        return ahead, i, 1 - slot

    s.begin(pl.program_id(0))
    first = s.busy(pl.program_id(0))
    pl.when(first < count)(lambda: coming(first, 0).start())
    _, last, _ = lax.while_loop(lambda at: at[0] < count, item, (first, jnp.int32(count), jnp.int32(0)))
    pl.when(last < count)(lambda: gone(last))


def call(
    z: Sizes, q: jax.Array, kv: jax.Array, m: Items, sinks: jax.Array | None, vmem: int, interpret: Any
) -> jax.Array:
    """q over kv [pages, page*2*Hk, D] -> the same as q, which is [items,1,Hq,D] for flat, and [Hk,G,rows,D] for split,
    where rows of no item come out as anything. `sinks` f32[parts,M,LANES]."""
    dim, count = q.shape[3], m.pages.shape[0]
    parts, rows = (1, q.shape[2]) if z.tile == 1 else (z.heads, q.shape[1] * z.tile)
    anywhere, whole = pl.BlockSpec(memory_space=pl.ANY), pl.BlockSpec(memory_space=pltpu.VMEM)
    extra = [] if sinks is None else [sinks]
    size = z.tokens * z.rows
    scratch = [
        pltpu.VMEM((z.buffers, size, dim), kv.dtype),
        pltpu.SemaphoreType.DMA((z.buffers,)),
        pltpu.SMEM((3,), jnp.int32),
        *(pltpu.VMEM((parts, rows, n), jnp.float32) for n in (LANES, LANES, dim)),
    ]
    if z.tile > 1 or z.pack == 1:
        lanes = min(LANES, dim)
        words = (dim // lanes, size // z.pack, lanes)
        scratch.append(pltpu.VMEM(words, kv.dtype if z.pack == 1 else jnp.uint32))
    if z.tile == 1:
        steps = count // z.cores // z.items
        queries = pl.BlockSpec((z.items, *q.shape[1:]), lambda c, s, *_: (c * steps + s, 0, 0, 0))
        body, grid = partial(flat, z, count // z.cores, sinks is not None), [z.cores, steps]
    else:
        tile = (*q.shape[:2], z.tile, dim)
        scratch += [pltpu.VMEM((2, *tile), q.dtype), pltpu.VMEM(tile, q.dtype), pltpu.SemaphoreType.DMA((3,))]
        body, grid, queries = partial(split, z, count, sinks is not None), [z.cores], anywhere
    keys = m.table.size * z.page
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=INPUTS,
            grid=tuple(grid),
            in_specs=[queries, whole, anywhere, *(whole for _ in extra)],
            out_specs=queries,
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary")[: len(grid)],
            vmem_limit_bytes=vmem,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * parts * rows * dim * keys,
            transcendentals=parts * rows * keys,
            bytes_accessed=2 * q.size * q.dtype.itemsize + keys * z.rows * dim * kv.dtype.itemsize,
        ),
        name=f"ragged_paged_attention_{'flat' if z.tile == 1 else 'split'}",
        interpret=interpret,
    )(*vars(m).values(), q, jnp.asarray(z.offsets(rows)), kv, *extra)
