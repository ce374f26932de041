"""One checkpoint, whatever its format, under Hugging Face's names."""

from __future__ import annotations

import json
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyradix.backend.protocol import HostArray
from polyradix.graph.errors import CheckpointError


@dataclass(frozen=True)
class Checkpoint:
    """`read` gives a tensor by name, as float32, float16 or ml_dtypes bfloat16; `where` names the file that holds it.

    `gguf` is the metadata of a GGUF file, which then also holds the tokenizer; else `folder` has the tokenizer's files.
    """

    source: str
    config: dict[str, Any]
    names: Set[str]
    read: Callable[[str], HostArray]
    where: Callable[[str], str]
    generation_config: dict[str, Any] | None = None
    folder: Path | None = None
    gguf: dict[str, Any] | None = None
    dummy: bool = False

    def tensor(self, name: str, shape: tuple[int, ...] | None = None) -> HostArray:
        """Raises CheckpointError naming the file if the tensor is missing, unreadable or not of the expected shape."""
        if name not in self.names:
            raise CheckpointError(f"{self.source}: no tensor {name}")
        value = self.read(name)
        if shape is not None and value.shape != shape:
            raise CheckpointError(
                f"{self.where(name)}: tensor {name} has shape {list(value.shape)}; expected {list(shape)}"
            )
        return value


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: unreadable JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def read_optional_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None
