"""Block sizes by the chip that a kernel is traced for."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jax.experimental.pallas import tpu as pltpu

DEFAULT = "v5e"  # for chips that a file does not name, and where kernels are interpreted


def tuned(file: Path) -> Any:
    """The entry of a JSON file for the chip of the mesh in context, else of JAX's default device."""
    name = str(pltpu.get_tpu_info().chip_version) if pltpu.is_tpu_device() else DEFAULT
    table = _read(file)
    return table.get(name, table[DEFAULT])


@cache
def _read(file: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(file.read_text())
    return table
