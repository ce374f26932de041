"""What validators share: what chips have, how they say no, and block sizes by the chip that a kernel is traced for."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8
SMEM = 1 << 19  # bytes that one call may use; chips have 1 MiB
DTYPES = ("bfloat16", "float32")
DEFAULT = "v5e"  # for chips that a file does not name, and where kernels are interpreted


class Problems(list[str]):
    """Why a kernel does not take something: field, value, what was expected."""

    def expect(self, ok: bool, field: str, value: object, expected: str) -> None:
        if not ok:
            self.append(f"{field} is {value}; expected {expected}")


def tuned(file: Path) -> Any:
    """The entry of a JSON file for the chip of the mesh in context, else of JAX's default device."""
    name = str(pltpu.get_tpu_info().chip_version) if pltpu.is_tpu_device() else DEFAULT
    table = _read(file)
    return table.get(name, table[DEFAULT])


def lanes(n: int) -> int:
    """Rounded up to whole lane tiles."""
    return -(-n // LANES) * LANES


@cache
def _read(file: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(file.read_text())
    return table
