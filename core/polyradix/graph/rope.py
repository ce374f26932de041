"""Rotary position tables (Su et al., "RoFormer", 2021), half-split pairs: column i turns with column i + D/2."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from polyradix.backend.protocol import HostArray
from polyradix.graph.config import Config
from polyradix.graph.errors import ModelError

TYPES = ("default", "dynamic", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class Rope:
    """`linear` divides every frequency by `factor`; `llama3` only the slow ones, with a blend between the wavelengths
    original_max_position / high_freq_factor and / low_freq_factor; `yarn` those that turn less than beta_slow times in
    the original context, with a blend up to beta_fast times (arXiv 2309.00071), between whole columns if `truncate`.
    `dynamic` raises theta as NTK scaling does for a context of factor * original_max_position, whatever the length of a
    sequence: a key in the cache must not change as its sequence grows. `freq_factors` [D/2] divide each frequency, and
    `magnitude` multiplies the table."""

    theta: float = 10000.0
    type: Literal["default", "dynamic", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    freq_factors: tuple[float, ...] = ()
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    magnitude: float = 1.0

    def stretched(self, max_position: int) -> int:
        """The context of a model whose config says `max_position`: for `dynamic` that is the one before scaling."""
        return int(self.factor * max_position) if self.type == "dynamic" else max_position


def frequencies(rope: Rope, dim: int) -> HostArray:
    """Radians per position, float64 [dim/2]."""
    theta = rope.theta
    if rope.type == "dynamic":
        theta *= (rope.factor**2 - rope.factor + 1) ** (dim / (dim - 2))
    freq: HostArray = theta ** (-np.arange(0, dim, 2) / dim)
    if rope.type in ("default", "dynamic"):
        return freq / np.array(rope.freq_factors) if rope.freq_factors else freq
    if rope.type == "linear":
        return freq / rope.factor
    blend = _llama3(rope, freq) if rope.type == "llama3" else _yarn(rope, dim)
    return freq * (blend + (1 - blend) / rope.factor)


def rope_table(rope: Rope, positions: int, dim: int) -> HostArray:
    """float32 [positions, dim]: cosines in the first half of the columns, sines in the second."""
    angles = np.outer(np.arange(positions), frequencies(rope, dim))
    table: HostArray = (np.hstack([np.cos(angles), np.sin(angles)]) * rope.magnitude).astype(np.float32)
    return table


def _llama3(rope: Rope, freq: HostArray) -> HostArray:
    """How much of each frequency stays."""
    turns = rope.original_max_position * freq / (2 * math.pi)  # over the original context
    out: HostArray = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return np.clip(out, 0.0, 1.0)


def _yarn(rope: Rope, dim: int) -> HostArray:
    """How much of each frequency stays: a ramp between the columns that turn beta_fast and beta_slow times."""
    turn = rope.original_max_position / (2 * math.pi)
    low, high = (dim * math.log(turn / beta) / (2 * math.log(rope.theta)) for beta in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    out: HostArray = 1 - (np.arange(dim // 2) - low) / (high - low if high != low else 0.001)
    return np.clip(out, 0.0, 1.0)


def magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's mscale: how much larger scores should be in a context `factor` times as long."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def scaling(c: Config) -> Config:
    """Transformers 5 writes rope_parameters; older configs write rope_theta beside rope_scaling."""
    new = c.part("rope_parameters")
    return new if new.values else c.part("rope_scaling")


def read_rope(c: Config, max_position: int, dim: int, of: int | None = None, theta: float = 10000.0) -> Rope:
    """The table of `dim` columns. `of`: heads are so wide, and it is known that only these turn. `theta`: where the
    config has none."""
    r = scaling(c)
    theta = r.positive("rope_theta", c.positive("rope_theta", theta))
    if theta <= 1:
        raise (c if r.values.get("rope_theta") is None else r).wrong("rope_theta", "a number above 1")
    if nested := [name for name, value in r.values.items() if isinstance(value, Mapping)]:
        raise r.wrong(nested[0], "numbers, as all layers turn alike")
    kind = r.get("rope_type", str, r.get("type", str, ""))
    if not kind and r.values.get("factor") is not None:
        raise r.wrong("rope_type", f"one of {', '.join(TYPES)}")
    for part in (c, r):
        if part.get("partial_rotary_factor", float, 1.0) not in (1.0, dim / (of or dim)):
            raise part.wrong("partial_rotary_factor", "1.0")
    match kind or "default":
        case "default":
            return Rope(theta, freq_factors=_freq_factors(r, dim))
        case "linear":
            return Rope(theta, "linear", _factor(r))
        case "dynamic" if dim == 2:
            raise r.wrong("rope_type", "another for heads of 2 columns")
        case "dynamic":
            return Rope(theta, "dynamic", _factor(r), original_max_position=max_position)
        case "llama3":
            return _read_llama3(r, theta, max_position)
        case "yarn":
            return _read_yarn(r, theta, max_position)
    raise ModelError(f"model config: {r.prefix}rope_type is {kind!r}; expected one of {', '.join(TYPES)}")


def _read_llama3(r: Config, theta: float, max_position: int) -> Rope:
    low, high = r.positive("low_freq_factor"), r.positive("high_freq_factor")
    if high <= low:
        raise r.wrong("high_freq_factor", f"a number above low_freq_factor ({low})")
    original = r.count("original_max_position_embeddings", max_position)
    return Rope(theta, "llama3", _factor(r), low, high, original)


def _read_yarn(r: Config, theta: float, max_position: int) -> Rope:
    original = r.count("original_max_position_embeddings", max_position)
    factor = _factor(r, max(1.0, max_position / original))
    fast, slow = r.positive("beta_fast", 32.0), r.positive("beta_slow", 1.0)
    if fast <= slow:
        raise r.wrong("beta_fast", f"a number above beta_slow ({slow})")
    mscale, all_dim = r.at_least_0("mscale", float, 0.0), r.at_least_0("mscale_all_dim", float, 0.0)
    inferred = magnitude(factor, mscale) / magnitude(factor, all_dim) if mscale and all_dim else magnitude(factor)
    return Rope(
        theta,
        "yarn",
        factor,
        original_max_position=original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=r.get("truncate", bool, True),
        magnitude=r.positive("attention_factor", inferred),
    )


def _factor(r: Config, *default: float) -> float:
    value = r.positive("factor", *default)
    if value < 1:
        raise r.wrong("factor", "a number of at least 1")
    return value


def _freq_factors(r: Config, dim: int) -> tuple[float, ...]:
    """`freq_factors` is ours: what GGUF files carry instead of a rope type."""
    factors = tuple(r.values.get("freq_factors") or ())
    if factors and (len(factors) != dim // 2 or min(factors) <= 0):
        raise r.wrong("freq_factors", f"{dim // 2} numbers above 0")
    return factors
