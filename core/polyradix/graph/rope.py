"""Rotary position tables (Su et al., "RoFormer", 2021), half-split pairs: column i turns with column i + D/2."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from polyradix.backend.protocol import HostArray


@dataclass(frozen=True)
class Rope:
    """`linear` divides every frequency by `factor`; `llama3` only the slow ones, with a blend between the wavelengths
    original_max_position / high_freq_factor and / low_freq_factor. `freq_factors` [D/2] divide each frequency."""

    theta: float = 10000.0
    type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    freq_factors: tuple[float, ...] = ()


def frequencies(rope: Rope, dim: int) -> HostArray:
    """Radians per position, float64 [dim/2]."""
    freq: HostArray = rope.theta ** (-np.arange(0, dim, 2) / dim)
    if rope.type == "llama3":
        turns = rope.original_max_position * freq / (2 * math.pi)  # over the original context
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        return freq * (blend + (1 - blend) / rope.factor)
    return freq / (np.array(rope.freq_factors) if rope.freq_factors else rope.factor)


def rope_table(rope: Rope, positions: int, dim: int) -> HostArray:
    """float32 [positions, dim]: cosines in the first half of the columns, sines in the second."""
    angles = np.outer(np.arange(positions), frequencies(rope, dim))
    table: HostArray = np.hstack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    return table
