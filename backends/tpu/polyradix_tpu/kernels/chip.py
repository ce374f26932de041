"""Block sizes by the chip that a kernel is traced for."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jax.experimental.pallas import tpu as pltpu


def tuned(file: Path) -> Any:
    """The entry of a JSON file for the chip of the mesh in context, else of JAX's default device; "default" is for
    chips that the file does not name, and where there is no TPU and kernels are interpreted."""
    table = _read(file)
    return table.get(str(pltpu.get_tpu_info().chip_version) if pltpu.is_tpu_device() else "", table["default"])


@cache
def _read(file: Path) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(file.read_text())
    return table
