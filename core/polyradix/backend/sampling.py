"""Sampling, defined: the same logits and the same SampleBatch give the same token on every backend.

For one row of float32 logits x over V tokens, changed as `SampleBatch.adjust` says:

1. Tokens whose mask bit is 0 are removed.
2. Temperature 0: the token with the largest logit, the lowest id among equals. Done.
3. z = x / temperature (float32). Tokens are ranked by z descending, ties by id ascending.
4. top_k: only the first k ranks stay.
5. top_p: p = softmax(z of what stayed); a token stays if the sum of p over the ranks strictly before it is < top_p (so
   the token that crosses the boundary stays).
6. min_p: a token stays if p >= min_p * max(p), p taken from step 5 before it removed any.
7. The token with the largest z + g(seed, position, id), the lowest id among equals, where g is Gumbel noise:
   h = mix(mix(mix(seed) ^ position) ^ id) in uint32, mix being the murmur3 finaliser
   (Appleby, MurmurHash3, public domain): h ^= h>>16; h *= 0x85EBCA6B; h ^= h>>13; h *= 0xC2B2AE35; h ^= h>>16.
   u = ((h >> 9) + 0.5) * 2**-23 in float32, so that u is exact and never 1; g = -log(-log(u)).

Gumbel-max sampling: Maddison, Tarlow and Minka, "A* Sampling", 2014.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from polyradix.backend.batch import F32, I32, SampleBatch

U32: TypeAlias = NDArray[np.uint32]


def mix(h: U32) -> U32:
    """The murmur3 finaliser on uint32 values."""
    h = h ^ (h >> np.uint32(16))
    h = h * np.uint32(0x85EBCA6B)
    h = h ^ (h >> np.uint32(13))
    h = h * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def gumbel(seed: int, position: int, ids: NDArray[np.integer[Any]]) -> F32:
    """Noise for token ids, float32 of the same shape."""
    with np.errstate(over="ignore"):
        start = mix(np.array([seed & 0xFFFFFFFF], np.uint32)) ^ np.uint32(position & 0xFFFFFFFF)
        h = mix(mix(start) ^ ids.astype(np.uint32))
    u = ((h >> np.uint32(9)).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    noise: F32 = -np.log(-np.log(u))
    return noise


def adjusted(logits: F32, batch: SampleBatch) -> F32:
    """Logits [S,V] as batch.adjust changes them: a copy, or the same where it changes nothing."""
    a = batch.adjust
    if a is None:
        return logits
    logits = logits.copy()
    x = logits[a.row, a.id]
    logits[a.row, a.id] = np.where(x > 0, x / a.factor, x * a.factor) + a.add
    return logits


def sample_row(x: F32, batch: SampleBatch, s: int) -> int:
    """The sampled token of row `s`, from its adjusted logits x [V] float32."""
    x = np.asarray(x, np.float32)
    ids = np.arange(len(x))
    if batch.mask is not None:
        bits = np.unpackbits(batch.mask[s].view(np.uint8), bitorder="little")[: len(x)]
        ids = ids[bits.astype(bool)]
        x = x[ids]
    if batch.temperature[s] == 0:
        return int(ids[np.argmax(x)])
    z = x / batch.temperature[s]
    k, top_p, min_p = int(batch.top_k[s]), float(batch.top_p[s]), float(batch.min_p[s])
    if 0 < k < len(z):  # narrow before sorting; ties at the k-th value are settled by the stable sort below
        keep = np.flatnonzero(z >= np.partition(z, len(z) - k)[len(z) - k])
        z, ids = z[keep], ids[keep]
    if k > 0 or top_p < 1 or min_p > 0:
        order = np.argsort(-z, kind="stable")
        order = order[:k] if k > 0 else order
        z, ids = z[order], ids[order]
        p = np.exp(z - z[0])
        p = p / p.sum()
        stays = (np.cumsum(p) - p < top_p) & (p >= min_p * p[0])
        stays[0] = True
        z, ids = z[stays], ids[stays]
    score = z + gumbel(int(batch.seed[s]), int(batch.position[s]), ids)
    return int(ids[score == score.max()].min())


def sample_host(logits: F32, batch: SampleBatch) -> I32:
    """All rows: logits [S,V] float32 -> i32[S]. Also the host fallback of backends without a sampler of their own."""
    logits = adjusted(logits, batch)
    if batch.greedy and batch.mask is None:
        best: I32 = np.argmax(logits, axis=1).astype(np.int32)
        return best
    return np.array([sample_row(logits[s], batch, s) for s in range(len(batch.seed))], np.int32)
