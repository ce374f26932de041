"""The chip that a kernel is traced for: what it holds, and the block sizes that were measured for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jax.experimental.pallas import tpu as pltpu

NAMES = {"7x": "tpu7x"}  # the others have the same name in JAX as in a topology


@dataclass(frozen=True)
class Chip:
    """One TensorCore of a kind: bytes of vector memory and of scalar memory."""

    name: str
    vmem: int
    smem: int


V5E = Chip("v5e", 128 << 20, 1 << 20)


def chip() -> Chip:
    """Of the mesh in context, else of JAX's default device; V5E where that is no TPU and kernels are interpreted."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return V5E
    name = str(info.chip_version)
    return Chip(NAMES.get(name, name), info.vmem_capacity_bytes, info.smem_capacity_bytes)


@cache
def tuned(file: Path, name: str) -> dict[str, Any]:
    """The entry of chip `name` in a JSON file; of "v5e" if the file does not know the chip."""
    table: dict[str, dict[str, Any]] = json.loads(file.read_text())
    return table.get(name, table[V5E.name])
