"""The definition, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def grouped_matmul(lhs: ArrayLike, rhs: ArrayLike, group_sizes: ArrayLike) -> NDArray[np.float64]:
    """lhs [M,K], rhs [E,N,K], group_sizes [E] -> [M,N]."""
    rows, weights = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    out, start = np.zeros((len(rows), weights.shape[1])), 0
    for weight, size in zip(weights, np.asarray(group_sizes), strict=True):
        out[start : start + size] = rows[start : start + size] @ weight.T
        start += size
    return out
