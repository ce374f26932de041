"""Typed reads of a model's config, with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from polyradix.graph.errors import ModelError

MOST = 2**31 - 1
HUGE = 1e30
MANY = 4096  # more layers or experts than any model has
_REQUIRED: Any = object()
_N = TypeVar("_N", int, float)
_T = TypeVar("_T", int, float, str, bool)


class Config:
    """Typed reads of a JSON object; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values, self.prefix = values, prefix

    def wrong(self, name: str, expected: str) -> ModelError:
        found = "missing" if self.values.get(name) is None else repr(self.values[name])
        return ModelError(f"model config: {self.prefix}{name} is {found}; expected {expected}")

    def get(self, name: str, kind: type[_T], default: _T = _REQUIRED) -> _T:
        value = self.values.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) <= HUGE:
                raise self.wrong(name, f"a number between -{HUGE:g} and {HUGE:g}")
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(name, {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind])
        return value

    def count(self, name: str, default: int = _REQUIRED, most: int = MOST) -> int:
        value = self.get(name, int, default)
        if value < 1:
            raise self.wrong(name, "an integer >= 1")
        if value > most:
            raise self.wrong(name, f"an integer of at most {most}")
        return value

    def positive(self, name: str, default: float = _REQUIRED) -> float:
        value = self.get(name, float, default)
        if not value > 0:
            raise self.wrong(name, "a number above 0")
        return value

    def at_least_0(self, name: str, kind: type[_N], default: _N) -> _N:
        value = self.get(name, kind, default)
        if not 0 <= value <= MOST:
            raise self.wrong(name, f"{'an integer' if kind is int else 'a number'} from 0 to {MOST}")
        return value

    def part(self, name: str) -> Config:
        value = self.values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Config(value, f"{self.prefix}{name}.")
