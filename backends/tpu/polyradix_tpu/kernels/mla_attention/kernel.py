"""Attention over latent rows, a unit at a time: some neighbouring queries of one sequence, with all their heads. Keys
are fetched by DMA while those before them are met, across units as well; so are queries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from math import e, log, log2
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polyradix_tpu.batch import JaxMeta
from polyradix_tpu.kernels.chip import LANES, lanes
from polyradix_tpu.kernels.mla_attention.validate import VMEM, Blocks, units
from polyradix_tpu.kernels.xla import HIDDEN, precision

Ref: TypeAlias = Any
Pairs: TypeAlias = Callable[[Any], Iterable[tuple[Ref, Ref]]]


class Plan(NamedTuple):
    """What each unit works on, all i32 [units]; what comes after the batch's last unit means nothing."""

    seq: jax.Array
    row: jax.Array  # of its first query in the batch
    count: jax.Array  # of its queries
    first: jax.Array  # position of its first query
    turn: jax.Array  # blocks of keys that the units before it fetch
    total: jax.Array  # i32 [1] how many units there are


class Sizes(NamedTuple):
    pages: int  # of a sequence, in the page table
    heads: int
    latent: int
    rope: int
    scale: float
    blocks: Blocks
    lse: bool


def plan(m: JaxMeta, blocks: Blocks) -> Plan:
    counts = pl.cdiv(m.cu_q[1:] - m.cu_q[:-1], blocks.queries)
    until = jnp.cumsum(counts)
    unit = jnp.arange(units(m.shape, blocks.queries))
    seq = jnp.minimum(jnp.sum(until <= unit[:, None], axis=1), m.shape.seqs - 1)
    row = m.cu_q[seq] + (unit - (until - counts)[seq]) * blocks.queries
    count = jnp.minimum(m.cu_q[seq + 1] - row, blocks.queries)
    first = m.positions[row]
    fetched = pl.cdiv(first + count, blocks.keys)
    return Plan(seq, row, count, first, jnp.cumsum(fetched) - fetched, until[-1:])


def _move(count: Any, pairs: Pairs, sem: Ref, wait: bool = False) -> None:
    """Starts copies from one to the other of pairs(i), i < count, or waits for them."""

    def one(i: Any, _: None) -> None:
        for source, target in pairs(i):
            copy = pltpu.make_async_copy(source, target, sem)
            copy.wait() if wait else copy.start()

    lax.fori_loop(0, count, one, None)


def _kernel(z: Sizes, pages: Ref, *refs: Ref) -> None:
    p, (q_latent, q_rope, cache), outs = Plan(*refs[:6]), refs[6:9], refs[9 : 10 + z.lse]
    latent, rope, held, done, logs, top, total, acc, asked, arrived, sent = refs[10 + z.lse :]
    start, each, keys = pl.program_id(0) * pl.num_programs(1), pl.num_programs(1), z.blocks.keys
    unit, last = start + pl.program_id(1), jnp.minimum(start + each, p.total[0]) - 1  # of this core's

    def queries(unit: Any, wait: bool = False) -> None:
        row, slot = p.row[unit], unit % 2
        pairs = ((q_latent, latent), (q_rope, rope))
        _move(p.count[unit], lambda i: ((x.at[row + i], y.at[slot, i]) for x, y in pairs), asked.at[slot], wait)

    def rows(unit: Any, block: Any, slot: Any, wait: bool = False) -> None:
        at, most = p.seq[unit] * z.pages + block * held.shape[1], held.shape[1]
        left = pl.cdiv(p.first[unit] + p.count[unit] - block * keys, held.shape[2])
        read = cache.at[:, :, pl.ds(0, held.shape[3])]
        _move(jnp.minimum(left, most), lambda i: [(read.at[pages[at + i]], held.at[slot, i])], arrived.at[slot], wait)

    def results(unit: Any, wait: bool = False) -> None:
        row, pairs = p.row[unit], [*zip((done, logs), outs, strict=False)]
        _move(p.count[unit], lambda i: ((x.at[i], y.at[row + i]) for x, y in pairs), sent, wait)

    def meet(masked: bool, block: Any, _: None) -> None:
        slot = (p.turn[unit] + block) % 2
        more = (block + 1) * keys < p.first[unit] + p.count[unit]
        then = jnp.where(more, unit, unit + 1)
        pl.when(then <= last)(lambda: rows(then, jnp.where(more, block + 1, 0), 1 - slot))
        rows(unit, block, slot, wait=True)
        found = held[slot].reshape(keys, -1)
        first = p.first[unit] - block * keys if masked else None
        if masked:  # rows that nobody wrote may be NaN
            at = lax.broadcasted_iota(jnp.int32, found.shape, 0)
            found = jnp.where(at < first + p.count[unit], found, jnp.zeros_like(found))
        mine, turned = (x[unit % 2].reshape(-1, x.shape[3]) for x in (latent, rope))
        _fold(z, mine, turned, found, first, top, total, acc)

    def begin() -> None:
        queries(unit)
        rows(unit, 0, p.turn[unit] % 2)

    def whole() -> None:
        pl.when(unit == start)(begin)
        pl.when(unit < last)(lambda: queries(unit + 1))
        queries(unit, wait=True)
        top[...], total[...], acc[...] = jnp.full_like(top, HIDDEN), jnp.zeros_like(total), jnp.zeros_like(acc)
        clear = (p.first[unit] + 1) // keys  # blocks that all queries see all of
        lax.fori_loop(0, clear, partial(meet, False), None)
        lax.fori_loop(clear, pl.cdiv(p.first[unit] + p.count[unit], keys), partial(meet, True), None)
        pl.when(unit > start)(lambda: results(unit - 1, wait=True))
        done[...] = (acc[...] / total[:, :1]).astype(done.dtype).reshape(done.shape)
        logs[...] = ((top[...] + jnp.log2(total[...])) * log(2)).reshape(logs.shape)
        results(unit)
        pl.when(unit == last)(lambda: results(unit, wait=True))

    pl.when(unit <= last)(whole)


def _fold(
    z: Sizes, latent: jax.Array, rope: jax.Array, found: jax.Array, first: Any, top: Ref, total: Ref, acc: Ref
) -> None:
    """Queries [queries*H] meet the keys `found`; query 0 sees those up to number `first`, all if that is None. Scores
    are in units of log 2."""
    dot = partial(lax.dot_general, precision=precision(found.dtype), preferred_element_type=jnp.float32)
    across = (((1,), (1,)), ((), ()))
    score = dot(latent, found[:, : z.latent], across) + dot(rope, found[:, z.latent : z.latent + z.rope], across)
    score *= z.scale * log2(e)
    if first is not None:
        query = lax.broadcasted_iota(jnp.int32, (len(latent), 1), 0) // z.heads
        score = jnp.where(lax.broadcasted_iota(jnp.int32, score.shape, 1) <= first + query, score, HIDDEN)
    old = top[...]
    new = jnp.maximum(old, jnp.max(score, axis=1, keepdims=True))
    p, fade = jnp.exp2(score - new[:, :1]), jnp.exp2(old - new)
    top[...] = new
    total[...] = total[...] * fade + jnp.sum(p, axis=1, keepdims=True)
    acc[...] = acc[...] * fade[:, :1] + dot(p.astype(found.dtype), found[:, : z.latent], (((1,), (0,)), ((), ())))


def call(
    q_latent: jax.Array,
    q_rope: jax.Array,
    cache: jax.Array,
    m: JaxMeta,
    scale: float,
    blocks: Blocks,
    lse: bool,
    interpret: Any,
) -> tuple[jax.Array, jax.Array | None]:
    """See the package."""
    p = plan(m, blocks)
    (tokens, heads, latent), rope, page = q_latent.shape, q_rope.shape[2], cache.shape[1]
    each, dtype, wide = (blocks.queries, heads), cache.dtype, lanes(latent + rope)
    state = pltpu.VMEM((blocks.queries * heads, LANES), jnp.float32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        partial(_kernel, Sizes(m.shape.pages, heads, latent, rope, scale, blocks, lse)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(p),
            grid=(blocks.cores, pl.cdiv(p.total[0], blocks.cores)),
            in_specs=[anywhere] * 3,
            out_specs=[anywhere] * (1 + lse),
            scratch_shapes=[
                pltpu.VMEM((2, *each, latent), dtype),
                pltpu.VMEM((2, *each, rope), dtype),
                pltpu.VMEM((2, blocks.keys // page, page, wide), dtype),
                pltpu.VMEM((*each, latent), dtype),
                pltpu.VMEM((*each, LANES), jnp.float32),
                state,
                state,
                pltpu.VMEM((blocks.queries * heads, latent), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((tokens, heads, latent), dtype),
            jax.ShapeDtypeStruct((tokens, heads, LANES), jnp.float32),
        ][: 1 + lse],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM + (4 << 20), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="mla_attention",
    )(m.pages.reshape(-1), *p, q_latent, q_rope, cache)
    return out[0], out[1][:, :, 0] if lse else None
