"""Attention over the paged cache in Pallas: blocks of pages stream through VMEM and a softmax runs over them.

An item is up to `tile` neighbouring query rows of one sequence. Its blocks are fetched by DMA, `buffers` deep and
across items, so that the stream does not drain where an item ends. Two ways to read a block [tokens*2*Hk, D], whose
rows are key and value of head 0, of head 1 and so on:

* flat, for single rows (decode): nothing is taken apart. All query heads meet all rows; columns that are not a key of
  the query's own head count as out of sight, and the weights move one lane to the right, from key to value. The matrix
  unit, idle in decode, does 2*Hk times the work.
* split, for tiles (prefill): keys and values of one head are taken out of the block, to do no more work than there is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

HIDDEN = -1e30  # finite, so that a row that has seen nothing yet is not NaN
NEVER = 1 << 30  # the offset of a column that no row sees
LANES = 128
Ref: TypeAlias = Any


@dataclass(frozen=True)
class Sizes:
    """What one kernel is compiled for. `tile` 1 is flat."""

    tile: int  # query rows of an item
    heads: int  # Hk
    page: int
    block: int  # pages of a block
    buffers: int
    items: int  # per grid step
    cores: int
    scale: float
    window: int | None
    softcap: float | None

    @property
    def rows(self) -> int:
        """Of the cache, per token."""
        return 2 * self.heads

    @property
    def tokens(self) -> int:
        """Of a block."""
        return self.block * self.page

    @property
    def columns(self) -> int:
        """Of a block's scores."""
        return self.tokens * (self.rows if self.tile == 1 else 1)

    @property
    def chunk(self) -> int:
        """Columns whose offsets are those of any other chunk, but for the tokens before it."""
        return LANES if self.tile > 1 or LANES % self.rows == 0 else self.columns

    def offsets(self, rows: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """[rows, chunk]: token of the column minus query row in the item; NEVER for other heads' columns and values."""
        at, row = np.arange(self.chunk, dtype=np.int32), np.arange(rows, dtype=np.int32)[:, None]
        if self.tile > 1:
            return at - row % self.tile
        mine = at % self.rows == 2 * (row // (rows // self.heads))
        return np.where(mine, at // self.rows, np.int32(NEVER))


@dataclass(frozen=True)
class Items:
    """What to compute, int32 [items] each; `table` [S*P] is the page table."""

    table: Any
    start: Any  # index in `table` of the first page to read
    pages: Any  # how many; 0: nothing to do
    query: Any  # first query row's position, minus that of the first key to read
    keys: Any  # keys from there on; what is behind them in their page may be anything


def _stream(z: Sizes, m: Items, kv: Ref, buf: Ref, sem: Ref, end: Any) -> tuple[Any, Any, Any, Any]:
    """Functions: `fetch` and `wait` (item, block, slot), `busy` (item), and what comes `after` (item, block)."""

    def copy(i: Any, b: Any, slot: Any, p: Any) -> Any:
        size = z.page * z.rows
        page = m.table[m.start[i] + b * z.block + p]
        return pltpu.make_async_copy(kv.at[page], buf.at[slot, pl.ds(p * size, size)], sem.at[slot])

    def each(i: Any, b: Any, whole: Any, one: Any) -> None:
        n = m.pages[i] - b * z.block
        pl.when(n >= z.block)(whole)
        pl.when(n < z.block)(lambda: lax.fori_loop(0, n, lambda p, _: one(p), None))

    def fetch(i: Any, b: Any, slot: Any) -> None:
        def whole() -> None:
            for p in range(z.block):
                copy(i, b, slot, p).start()

        pl.when(i < end)(lambda: each(i, b, whole, lambda p: copy(i, b, slot, p).start()))

    def wait(i: Any, b: Any, slot: Any) -> None:
        whole = pltpu.make_async_copy(buf.at[slot], buf.at[slot], sem.at[slot])
        each(i, b, whole.wait, lambda p: copy(i, b, slot, p).wait())

    def busy(i: Any) -> Any:
        """The first item from i on with something to do."""
        return lax.while_loop(lambda i: (i < end) & (m.pages[jnp.minimum(i, end - 1)] == 0), lambda i: i + 1, i)

    def after(i: Any, b: Any) -> tuple[Any, Any]:
        more = (i < end) & ((b + 1) * z.block < m.pages[jnp.minimum(i, end - 1)])
        ahead: tuple[Any, Any] = lax.cond(more, lambda: (i, b + 1), lambda: (busy(i + 1), jnp.int32(0)))
        return ahead

    return fetch, wait, busy, after


def kernel(z: Sizes, per_core: int, sink: bool, *refs: Ref) -> None:
    m, (q, offsets, kv), refs = Items(*refs[:5]), refs[5:8], refs[8:]
    sinks, refs = (refs[0], refs[1:]) if sink else (None, refs)
    out, buf, sem, cursor, top, total, acc, *rest = refs
    words = rest[0] if rest else None
    first = pl.program_id(0) * per_core
    fetch, wait, busy, after = _stream(z, m, kv, buf, sem, first + per_core)

    def start_stream() -> None:
        i, b = busy(first), jnp.int32(0)
        for slot in range(z.buffers - 1):
            fetch(i, b, slot)
            i, b = after(i, b)
        cursor[0], cursor[1], cursor[2] = i, b, 0

    pl.when(pl.program_id(1) == 0)(start_stream)

    def block(b: Any, i: Any, row: Any) -> None:
        slot = cursor[2]
        fetch(cursor[0], cursor[1], jnp.where(slot == 0, z.buffers - 1, slot - 1))
        cursor[0], cursor[1] = after(cursor[0], cursor[1])
        cursor[2] = jnp.where(slot == z.buffers - 1, 0, slot + 1)
        wait(i, b, slot)
        past = b * z.tokens
        _clear(buf.at[slot], (m.keys[i] - past) * z.rows)
        bound = m.query[i] - past
        if z.tile > 1:
            _unpack(buf.at[slot], words)

        def fold(part: Any, _: None) -> None:
            state = top.at[part], total.at[part], acc.at[part]
            _fold(z, q[row, part], *_part(z, buf.at[slot], words, part), offsets, bound, *state)

        lax.fori_loop(0, q.shape[1], fold, None)

    def item(row: Any, _: None) -> None:
        i = first + pl.program_id(1) * z.items + row
        _reset(sinks, top, total, acc)
        lax.fori_loop(0, pl.cdiv(m.pages[i], z.block), lambda b, _: block(b, i, row), None)
        share = total[...].sum(axis=2, keepdims=True)
        out[row] = (acc[...] / jnp.where(share == 0, 1, share)).astype(out.dtype)

    lax.fori_loop(0, z.items, item, None)


def _reset(sinks: Ref | None, top: Ref, total: Ref, acc: Ref) -> None:
    top[...] = jnp.full(top.shape, HIDDEN, jnp.float32) if sinks is None else sinks[...]
    lane = lax.broadcasted_iota(jnp.int32, total.shape, 2)
    total[...] = jnp.where(lane == 0, 0.0 if sinks is None else 1.0, 0.0)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)


def _clear(rows: Ref, limit: Any) -> None:
    """Zeros from row `limit` on: what is there is nobody's, and 0 * NaN is NaN."""

    def zero() -> None:
        at = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        rows[...] = jnp.where(at < limit, rows[...], jnp.zeros((), rows.dtype))

    pl.when(limit < rows.shape[0])(zero)


def _part(z: Sizes, rows: Ref, words: Ref, part: Any) -> tuple[jax.Array, jax.Array]:
    """Keys and values of one head [tokens, D]; flat, of all heads at once [tokens*2*Hk, D]."""
    if z.tile == 1:
        return rows[...], rows[...]
    if rows.dtype.itemsize == 4:
        return _strided(words, 2 * part, z.tokens, z.rows), _strided(words, 2 * part + 1, z.tokens, z.rows)
    pair = _strided(words, part, z.tokens, z.heads)  # a key's bits are the lower half, its value's the upper one
    k, v = (pltpu.bitcast(x, jnp.float32).astype(rows.dtype) for x in (pair << 16, pair & jnp.uint32(0xFFFF0000)))
    return k, v


def _strided(words: Ref, first: Any, size: int, stride: int) -> jax.Array:
    return jnp.concatenate([words[c, pl.ds(first, size, stride=stride), :] for c in range(words.shape[0])], axis=1)


def _unpack(rows: Ref, words: Ref) -> None:
    """rows [n,D] into words [D/LANES, n', LANES] of 32 bits: only such can be read with a stride."""
    for c in range(words.shape[0]):
        words[c] = pltpu.bitcast(rows[:, c * words.shape[2] : (c + 1) * words.shape[2]], words.dtype)


def _fold(
    z: Sizes, q: jax.Array, k: jax.Array, v: jax.Array, offsets: Ref, bound: Any, top: Ref, total: Ref, acc: Ref
) -> None:
    """One block more in the running softmax of q [M,D]: its maximum, sums of lanes [M,LANES], weighted values [M,D]."""
    exact = lax.Precision.HIGHEST if k.dtype == jnp.float32 else lax.Precision.DEFAULT
    dot = partial(lax.dot_general, precision=exact, preferred_element_type=jnp.float32)
    score = dot(q, k, (((1,), (1,)), ((), ())))
    step = z.chunk // (z.columns // z.tokens)
    scores = [
        _masked(z, score[:, c * z.chunk : (c + 1) * z.chunk], offsets[...], bound - c * step)
        for c in range(z.columns // z.chunk)
    ]
    before = top[...][:, :1]
    now = jnp.maximum(before, reduce(jnp.maximum, scores).max(axis=1, keepdims=True))
    weights = [jnp.exp(x - now) for x in scores]
    fade = jnp.exp(before - now)
    top[...] = jnp.broadcast_to(now, top.shape)
    sums = reduce(jnp.add, weights)
    total[...] = total[...] * fade + reduce(jnp.add, jnp.split(sums, sums.shape[1] // LANES, axis=1))
    if z.tile == 1:
        weights = [pltpu.roll(x, 1, 1) for x in weights]  # hidden columns are zero: nothing enters at lane 0
    p = jnp.concatenate([x.astype(v.dtype) for x in weights], axis=1)
    acc[...] = acc[...] * fade + dot(p, v, (((1,), (0,)), ((), ())))


def _masked(z: Sizes, score: jax.Array, offsets: jax.Array, bound: Any) -> jax.Array:
    score = score * z.scale
    if z.softcap is not None:
        score = z.softcap * jnp.tanh(score / z.softcap)
    seen = offsets <= bound
    if z.window is not None:
        seen &= offsets > bound - z.window
    return jnp.where(seen, score, HIDDEN)


def call(
    z: Sizes, q: jax.Array, kv: jax.Array, m: Items, sinks: jax.Array | None, vmem: int, interpret: Any
) -> jax.Array:
    """q [N,parts,M,D] over kv [pages, page*2*Hk, D] -> the same as q. `sinks` f32[parts,M,LANES]. See Sizes, Items."""
    count, parts, rows, dim = q.shape
    per_core = count // z.cores
    steps = per_core // z.items
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    some = pl.BlockSpec((z.items, parts, rows, dim), lambda c, s, *_: (c * steps + s, 0, 0, 0))
    extra = [] if sinks is None else [sinks]
    size = z.tokens * z.rows
    scratch = [
        pltpu.VMEM((z.buffers, size, dim), kv.dtype),
        pltpu.SemaphoreType.DMA((z.buffers,)),
        pltpu.SMEM((3,), jnp.int32),
        *(pltpu.VMEM((parts, rows, n), jnp.float32) for n in (LANES, LANES, dim)),
    ]
    if z.tile > 1:
        lanes, pack = min(LANES, dim), 4 // kv.dtype.itemsize
        scratch.append(pltpu.VMEM((dim // lanes, size // pack, lanes), jnp.uint32 if pack == 2 else kv.dtype))
    keys = m.table.size * z.page
    return pl.pallas_call(
        partial(kernel, z, per_core, sinks is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(z.cores, steps),
            in_specs=[some, whole, pl.BlockSpec(memory_space=pl.ANY), *(whole for _ in extra)],
            out_specs=some,
            scratch_shapes=scratch,
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=vmem, disable_bounds_checks=True
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * parts * rows * dim * keys,
            transcendentals=parts * rows * keys,
            bytes_accessed=2 * q.size * q.dtype.itemsize + keys * z.rows * dim * kv.dtype.itemsize,
        ),
        name=f"ragged_paged_attention_{'flat' if z.tile == 1 else 'split'}",
        interpret=interpret,
    )(*vars(m).values(), q, jnp.asarray(z.offsets(rows)), kv, *extra)
