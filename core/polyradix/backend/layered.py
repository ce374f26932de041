"""A cache as a list with one entry per layer, which layers of several groups share: for backends that hold it so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from polyradix.backend.protocol import KVSpec

T = TypeVar("T")


class LayerKV(tuple[T, ...]):
    """The parts of one layer's cache, and the group whose table says where its rows are."""

    group: int

    def __new__(cls, parts: Iterable[T], group: int = 0) -> LayerKV[T]:
        made = super().__new__(cls, parts)
        made.group = group
        return made


def layered(spec: KVSpec, make: Callable[[], Iterable[T]]) -> list[LayerKV[T]]:
    """An entry for each layer. `make` gives the parts of one of the spec's `depth` arrays."""
    arrays = [tuple(make()) for _ in range(spec.depth)]
    return [LayerKV(arrays[place], group) for group, place in spec.places]


def each_array(kv: Sequence[Any]) -> list[Any]:
    """Of the entries those with different arrays, in the order of places."""
    return list({id(layer[0]): layer for layer in kv}.values())
