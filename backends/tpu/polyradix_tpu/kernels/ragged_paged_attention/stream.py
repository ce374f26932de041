"""Blocks of pages on their way from HBM to VMEM, in the order in which they are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from polyradix_tpu.kernels.ragged_paged_attention.sizes import Items, Sizes

Ref: TypeAlias = Any


@dataclass(frozen=True)
class Stream:
    """The blocks of every `stride`-th item before `end`. All buffers but the one that is read are being filled, with
    blocks of later items where an item ends. `cursor` holds the item and the block to be fetched next, and the buffer
    to be read next."""

    z: Sizes
    m: Items
    kv: Ref  # [pages, page*2*Hk, D]
    buf: Ref  # [buffers, tokens*2*Hk, D]
    sem: Ref
    cursor: Ref
    end: Any
    stride: int

    def begin(self, first: Any) -> None:
        self.cursor[0], self.cursor[1], self.cursor[2] = self.busy(first), 0, 0
        lax.fori_loop(0, self.z.buffers - 1, lambda slot, _: self.fetch(slot), None)

    def read(self, i: Any, b: Any) -> Ref:
        """Block b of item i, which must be the next one; good until the next call."""
        slot, last = self.cursor[2], self.z.buffers - 1
        self.fetch(jnp.where(slot == 0, last, slot - 1))
        self.cursor[2] = jnp.where(slot == last, 0, slot + 1)
        self.wait(i, b, slot)
        return self.buf.at[slot]

    def busy(self, i: Any) -> Any:
        """The first item from i on with something to do, or one that is not before `end`."""

        def idle(i: Any) -> Any:
            return (i < self.end) & (self.m.pages[jnp.minimum(i, self.end - 1)] == 0)

        return lax.while_loop(idle, lambda i: i + self.stride, i)

    def fetch(self, slot: Any) -> None:
        """Starts to fill a buffer with the block that the cursor is at, and moves the cursor on."""
        i, b = self.cursor[0], self.cursor[1]

        def some() -> None:
            def start(p: Any) -> None:
                self._copy(i, b, slot, p).start()

            def whole() -> None:
                for p in range(self.z.block):
                    start(p)

            self._pages(i, b, whole, start)
            more = (b + 1) * self.z.block < self.m.pages[i]
            self.cursor[0] = lax.cond(more, lambda: i, lambda: self.busy(i + self.stride))
            self.cursor[1] = jnp.where(more, b + 1, 0)

        pl.when(i < self.end)(some)

    def wait(self, i: Any, b: Any, slot: Any) -> None:
        held = self.buf.at[slot]
        whole = pltpu.make_async_copy(held, held, self.sem.at[slot])  # a semaphore counts bytes, whatever their copies
        self._pages(i, b, whole.wait, lambda p: self._copy(i, b, slot, p).wait())

    def _copy(self, i: Any, b: Any, slot: Any, p: Any) -> Any:
        size = self.z.page * self.z.rows
        page = self.m.table[self.m.start[i] + b * self.z.block + p]
        return pltpu.make_async_copy(self.kv.at[page], self.buf.at[slot, pl.ds(p * size, size)], self.sem.at[slot])

    def _pages(self, i: Any, b: Any, whole: Callable[[], None], one: Callable[[Any], None]) -> None:
        n = self.m.pages[i] - b * self.z.block
        pl.when(n >= self.z.block)(whole)
        pl.when(n < self.z.block)(lambda: lax.fori_loop(0, n, lambda p, _: one(p), None))
