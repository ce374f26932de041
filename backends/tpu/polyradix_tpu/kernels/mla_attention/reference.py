"""The definition, in float64, one query at a time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from polyradix.backend.batch import HostBatch

F64 = NDArray[np.float64]


def mla_attention(
    q_latent: ArrayLike, q_rope: ArrayLike, cache: ArrayLike, b: HostBatch, scale: float
) -> tuple[F64, F64]:
    """q_latent [T,H,R], q_rope [T,H,Dr], cache [pages, page, at least R + Dr] -> [T,H,R] and the natural log of the
    sum of exponentials [T,H]."""
    q = np.concatenate([np.asarray(q_latent, np.float64), np.asarray(q_rope, np.float64)], axis=2)
    latent, rows = np.shape(q_latent)[2], np.asarray(cache, np.float64)
    out, lse = np.zeros((b.num_tokens, q.shape[1], latent)), np.zeros((b.num_tokens, q.shape[1]))
    for seq in range(b.num_seqs):
        held = rows[b.pages[seq]].reshape(-1, rows.shape[2])[:, : q.shape[2]]
        for token in range(b.cu_q[seq], b.cu_q[seq + 1]):
            seen = held[: b.positions[token] + 1]
            score = scale * q[token] @ seen.T
            top = score.max(axis=1, keepdims=True)
            p = np.exp(score - top)
            out[token] = p @ seen[:, :latent] / p.sum(axis=1, keepdims=True)
            lse[token] = top[:, 0] + np.log(p.sum(axis=1))
    return out, lse
