"""The living definition of the contract: plain NumPy, exact about rounding, made to be read."""

from __future__ import annotations

from typing import Literal

from polyradix.backend.capabilities import Unsupported
from polyradix.backend.numpy.backend import MAX_TP, NumpyBackend
from polyradix.backend.numpy.mesh import NumpyMesh
from polyradix.backend.protocol import Found


class NumpyEntry:
    protocol = (1, 0)

    def probe(self) -> Found:
        return Found(True, "reference implementation in NumPy, slow", rank=1)

    def create(
        self, *, compute: Literal["float32", "float64"] = "float32", async_launch: bool = False, tp: int = 1
    ) -> NumpyBackend:
        """`compute` float64 rounds nothing but weights, for use as a reference; logits are then float64 too.
        `async_launch` runs launches in order on a thread. `tp` ranks are threads."""
        if tp < 1:
            raise ValueError(f"tp is {tp}; expected at least 1")
        if tp > MAX_TP:
            raise Unsupported(f"tp {tp}", f"at most {MAX_TP}")
        return NumpyBackend(compute, async_launch) if tp == 1 else NumpyMesh(compute, async_launch, tp)


entry = NumpyEntry()
