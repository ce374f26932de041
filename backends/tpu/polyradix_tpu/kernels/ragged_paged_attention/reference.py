"""The definition of ragged paged attention in NumPy, float64, row by row."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import AttnSpec

F64: TypeAlias = NDArray[np.float64]


def attend(q: NDArray[Any], kv: NDArray[Any], b: HostBatch, a: AttnSpec) -> F64:
    """q [T,Hq,D] over kv [pages, page, 2*Hk, C], C >= D -> [T,Hq,D]; `a.sinks` is an array [Hq]."""
    out = np.zeros(q.shape)
    page = kv.shape[1]
    for s in range(b.num_seqs):
        held = kv[b.pages[s, : -(-int(b.kv_len[s]) // page)]].astype(np.float64)
        rows = held.reshape(-1, a.heads.kv, 2, kv.shape[3])[..., : a.heads.dim]
        for t in range(b.cu_q[s], b.cu_q[s + 1]):
            position = int(b.positions[t])
            start = 0 if a.window is None else max(0, position + 1 - a.window)
            for h in range(a.heads.q):
                seen = rows[start : position + 1, h // (a.heads.q // a.heads.kv)]
                sink = None if a.sinks is None else a.sinks[h]
                out[t, h] = _row(q[t, h].astype(np.float64), seen[:, 0], seen[:, 1], a, sink)
    return out


def _row(q: F64, keys: F64, values: F64, a: AttnSpec, sink: float | None) -> F64:
    score = keys @ q * a.scale
    if a.softcap is not None:
        score = a.softcap * np.tanh(score / a.softcap)
    if sink is not None:
        score, values = np.append(score, sink), np.vstack([values, np.zeros_like(q)])
    p = np.exp(score - score.max())
    out: F64 = p @ values / p.sum()
    return out
