"""The living definition of the contract: plain NumPy, exact about rounding, made to be read."""

from __future__ import annotations

from typing import Literal

from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.protocol import Found


class NumpyEntry:
    protocol = (1, 0)

    def probe(self) -> Found:
        return Found(True, "reference implementation in NumPy, slow", rank=1)

    def create(self, *, compute: Literal["float32", "float64"] = "float32", async_launch: bool = False) -> NumpyBackend:
        """`compute` float64 rounds nothing but weights, for use as a reference; logits are then float64 too.
        `async_launch` runs launches in order on a thread."""
        return NumpyBackend(compute, async_launch)


entry = NumpyEntry()
