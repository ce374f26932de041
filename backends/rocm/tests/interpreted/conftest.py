"""Triton's interpreter, made exact. Its own process."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "torch/tests/triton"))

from exact_interpreter import exact

__all__ = ["exact"]
