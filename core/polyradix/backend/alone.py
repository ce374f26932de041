"""Collectives of one rank: what a backend without tensor parallelism writes as `collectives = Alone()`."""

from __future__ import annotations

from collections.abc import Sequence

from polyradix.backend.protocol import Array


class Alone:
    """Collectives of size 1: every verb is the identity."""

    size = 1

    def all_reduce(self, x: Array) -> Array:
        return x

    def all_gather(self, x: Array, axis: int) -> Array:
        return x

    def reduce_scatter(self, x: Array, axis: int) -> Array:
        return x

    def all_to_all(self, x: Array, axis: int) -> Array:
        return x

    def broadcast(self, x: Array, root: int) -> Array:
        return x

    def permute(self, x: Array, to: Sequence[int]) -> Array:
        return x

    def barrier(self) -> None: ...
