"""One checkpoint, whatever its format, under Hugging Face's names."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from polyradix.backend.protocol import HostArray, ParamPart, Quant
from polyradix.graph.errors import CheckpointError

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


@dataclass(frozen=True)
class Parts:
    """What a Reader gives for a weight with this Quant, but for the bias."""

    quant: Quant
    read: Callable[[], Mapping[ParamPart, HostArray]]


@dataclass(frozen=True)
class Stored:
    """What a checkpoint has instead of a plain weight: the format's name, for people, and bytes. One without `parts` is
    always dequantised."""

    what: str
    nbytes: int
    parts: Parts | None = None


@dataclass(frozen=True)
class Checkpoint:
    """`read` gives a tensor by name, as float32, float16 or ml_dtypes bfloat16; `where` names the file that holds it.
    `stored` has the weights that are quantised; `read` dequantises these.

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
    stored: Mapping[str, Stored] = field(default_factory=dict)

    def tensor(self, name: str, shape: tuple[int, ...] | None = None, dtypes: Iterable[Any] = FLOATS) -> HostArray:
        """Raises CheckpointError naming the file if the tensor is missing, unreadable, or not of these dtypes and the
        expected shape."""
        if name not in self.names:
            raise CheckpointError(f"{self.source}: no tensor {name}")
        value = self.read(name)
        if value.dtype not in dtypes:
            raise CheckpointError(
                f"{self.where(name)}: tensor {name} is {value.dtype}; expected {', '.join(map(str, dtypes))}"
            )
        if shape is not None and value.shape != shape:
            raise CheckpointError(
                f"{self.where(name)}: tensor {name} has shape {list(value.shape)}; expected {list(shape)}"
            )
        return value


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: unreadable JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; expected an object")
    return value


def read_optional_json(path: Path) -> dict[str, Any] | None:
    return read_json(path) if path.is_file() else None
