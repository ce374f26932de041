"""How wrong is too wrong: a row's error may be K times its rounding floor, which the oracle sets and no vendor."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from polyradix_conformance.oracle import UNIT, Arr

K = 3.0


def floor(truth: Arr, emulations: Iterable[Arr], dtype: str) -> Arr:
    """Per row (all axes but the last): the emulations' largest error, at least one rounding of the largest value."""
    out: Arr = np.max([np.abs(e - truth).max(axis=-1) for e in emulations], axis=0)
    out = np.maximum(out, UNIT[dtype] * np.abs(truth).max(axis=-1))
    return out


def worst_ratio(got: Arr, truth: Arr, floors: Arr) -> tuple[float, int]:
    """The largest error over floor, and the flat index of its row. NaN and infinity count as infinite errors."""
    error = np.abs(got - truth).max(axis=-1)
    ratio = np.divide(error, floors, out=np.where(error == 0, 0.0, np.inf), where=floors > 0).ravel()
    ratio = np.where(np.isfinite(ratio), ratio, np.inf)
    return float(ratio.max()), int(ratio.argmax())
