"""Typed reads of a model's config, with errors that name the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from polyradix.graph.errors import ModelError

_REQUIRED: Any = object()
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
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.wrong(name, {int: "an integer", float: "a number", str: "a string", bool: "true or false"}[kind])
        return value

    def count(self, name: str, default: int = _REQUIRED) -> int:
        value = self.get(name, int, default)
        if value < 1:
            raise self.wrong(name, "an integer >= 1")
        return value

    def positive(self, name: str, default: float = _REQUIRED) -> float:
        value = self.get(name, float, default)
        if not 0 < value < math.inf:
            raise self.wrong(name, "a number above 0")
        return value

    def part(self, name: str) -> Config:
        value = self.values.get(name) or {}
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Config(value, f"{self.prefix}{name}.")
