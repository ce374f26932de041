"""What quantised weights are worth, code by code. Imports no backend. See oracle.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polyradix_conformance.oracle import Arr


@dataclass(frozen=True)
class Stored:
    """codes int [..., out, in]: bits of fp8, or up to 15; scale and zero [..., blocks down, blocks across]."""

    format: str
    block: tuple[int, int]
    codes: Arr
    scale: Arr
    zero: Arr | None = None


def weight(s: Stored) -> Arr:
    """float64 [..., out, in]."""
    out = np.array([e4m3(c) if s.format == "fp8" else float(c) for c in range(256)])[s.codes]
    for at in np.ndindex(s.scale.shape):
        *outer, down, across = at
        (rows, columns), (i, j) = s.block, (down * s.block[0], across * s.block[1])
        part = (*outer, slice(i, i + rows), slice(j, j + columns))
        out[part] = (out[part] - (0 if s.zero is None else float(s.zero[at]))) * float(s.scale[at])
    return out


def e4m3(code: int) -> float:
    """A sign, four bits of exponent with bias 7, three of mantissa; no infinity, and NaN where all seven bits are 1.

    Source: OCP 8-bit Floating Point Specification (OFP8) 1.0, 5.2.
    """
    sign, exponent, mantissa = -1 if code >> 7 else 1, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return np.nan
    return sign * (1 + mantissa / 8 if exponent else mantissa / 4) * 2.0 ** (exponent - 7)


def nearest_e4m3(x: Arr) -> Arr:
    """Of two that are as near, the one with the even code; the largest for what is beyond it."""
    values = np.array([e4m3(code) for code in range(127)])
    size = np.minimum(np.abs(x), values[-1])
    above = np.searchsorted(values, size)
    below = np.maximum(above - 1, 0)
    down, up = size - values[below], values[above] - size
    code = np.where((down < up) | ((down == up) & (below % 2 == 0)), below, above)
    out: Arr = np.copysign(values[code], x)
    return out
