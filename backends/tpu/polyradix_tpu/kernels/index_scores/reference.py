"""The definition, in float64, one tile at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

F64 = NDArray[np.float64]


def scores(
    index: ArrayLike, weights: ArrayLike, cache: ArrayLike, pages: ArrayLike, until: ArrayLike, first: int
) -> list[F64]:
    """See the package: of each tile [tile,until]."""
    index, weights, cache = (np.asarray(x, np.float64) for x in (index, weights, cache))
    out = []
    for q, w, table, n in zip(index, weights, np.asarray(pages), np.asarray(until), strict=True):
        keys = cache[table].reshape(-1, cache.shape[2])[:n, first : first + q.shape[2]]
        out.append(np.einsum("qh,qhk->qk", w, np.maximum(0, q @ keys.T)))
    return out
