"""Samplers and log probabilities that stray from backend/sampling.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from polyradix.backend.batch import SampleBatch
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import Arr
from polyradix.backend.protocol import HOST_DTYPES, Array, LogProbs
from polyradix.backend.sampling import adjusted
from polyradix_conformance.sabotage import sabotage


def allowed(batch: SampleBatch, shape: tuple[int, int]) -> Any:
    """The mask as bool [S,V]."""
    if batch.mask is None:
        return np.ones(shape, np.bool_)
    bits = np.unpackbits(batch.mask.view(np.uint8), axis=1, bitorder="little", count=shape[1])
    return bits.astype(np.bool_)


def packed(keep: Arr) -> Arr:
    """The mask of bool [S,V]."""
    return np.packbits(np.pad(keep, ((0, 0), (0, -keep.shape[1] % 32))), axis=1, bitorder="little").view(np.int32)


class Filtered(NumpyBackend):
    """Right: `stays` says what top-k, top-p and min-p leave, and the rest is masked."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        keep = allowed(batch, logits.shape)
        for s in np.flatnonzero(batch.temperature):
            z = np.where(keep[s], logits[s] / batch.temperature[s], -np.inf)
            order = np.argsort(-z, kind="stable")
            p = np.exp(z[order] - z.max())
            k, top_p, min_p = int(batch.top_k[s]) or len(z), float(batch.top_p[s]), float(batch.min_p[s])
            stays = self._stays(p, k, top_p, min_p)
            stays[0] = True
            keep[s, order] &= stays
        one, off = np.ones_like(batch.top_p), np.zeros_like(batch.top_k)
        return super().sample(logits, replace(batch, mask=packed(keep), top_k=off, top_p=one, min_p=0 * one))

    def _stays(self, p: Arr, k: int, top_p: float, min_p: float) -> Any:
        """p: unnormalised, descending."""
        p = np.where(np.arange(len(p)) < k, p, 0) / p[:k].sum()
        return (np.arange(len(p)) < k) & (np.cumsum(p) - p < top_p) & (p >= min_p * p[0])


@sabotage("L1/sample/grid")
class TopPExcludesBoundary(Filtered):
    """The token that crosses top_p goes."""

    def _stays(self, p: Arr, k: int, top_p: float, min_p: float) -> Any:
        inside = np.cumsum(p / p[:k].sum()) <= top_p
        return super()._stays(p, k, 1.0, min_p) & (inside if top_p < 1 else True)


@sabotage("L1/sample/grid")
class TopPBeforeTopK(Filtered):
    """top_p counts what top_k has removed."""

    def _stays(self, p: Arr, k: int, top_p: float, min_p: float) -> Any:
        return super()._stays(p, len(p), top_p, min_p) & super()._stays(p, k, 1.0, min_p)


@sabotage("L1/sample/grid")
class MinPAbsolute(Filtered):
    """min_p is compared with p, not with p over the largest p."""

    def _stays(self, p: Arr, k: int, top_p: float, min_p: float) -> Any:
        return super()._stays(p, k, top_p, 0.0) & (p / p[:k].sum() >= min_p)


@sabotage("L1/sample/grid")
class MinPOfLogits(NumpyBackend):
    """min_p compares logits, not probabilities."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        best = logits.max(axis=1, keepdims=True)
        stays = (logits >= batch.min_p[:, None] * best) | (logits == best) | (batch.min_p == 0)[:, None]
        keep = allowed(batch, logits.shape) & stays
        return super().sample(logits, replace(batch, mask=packed(keep), min_p=np.zeros_like(batch.min_p)))


@sabotage("L1/sample/grid")
class MinPIgnored(NumpyBackend):
    """min_p removes nothing."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return super().sample(logits, replace(batch, min_p=np.zeros_like(batch.min_p)))


@sabotage("L1/sample/grid")
class TopKOffByOne(NumpyBackend):
    """top_k keeps one token too many."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return super().sample(logits, replace(batch, top_k=batch.top_k + (batch.top_k > 0)))


@sabotage("L1/sample/grid")
class TemperatureSquared(NumpyBackend):
    """Logits are divided by the temperature twice."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return super().sample(logits, replace(batch, temperature=batch.temperature**2))


@sabotage("L1/sample/seeds")
class SeedIgnored(NumpyBackend):
    """Noise depends on the position alone."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return super().sample(logits, replace(batch, seed=np.zeros_like(batch.seed)))


@sabotage("L1/sample/seeds")
class SeedUnsigned(NumpyBackend):
    """A negative seed loses its sign."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return super().sample(logits, replace(batch, seed=batch.seed & 0x7FFFFFFF))


@sabotage("L1/sample/seeds")
class PositionIgnored(NumpyBackend):
    """Noise depends on the seed alone."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return super().sample(logits, replace(batch, position=np.zeros_like(batch.position)))


@sabotage("L1/sample/seeds")
class NoiseOfRow(NumpyBackend):
    """Noise depends on the row in the batch too."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        rows = np.arange(len(batch.position), dtype=np.int32)
        return super().sample(logits, replace(batch, position=batch.position + rows))


@sabotage("L1/sample/mask", "L1/meta/masked")
class NoiseOfIndex(NumpyBackend):
    """Noise is hashed from a token's index among those allowed, not from its id."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        out = super().sample(logits, batch)
        for s in np.flatnonzero(batch.temperature):
            ids = np.flatnonzero(allowed(batch, logits.shape)[s])
            row = SampleBatch(*(getattr(batch, name)[s : s + 1] for name in list(vars(batch))[:6]))
            out[s] = ids[super().sample(logits[s : s + 1, ids], row)[0]]
        return out


@sabotage("L1/sample/greedy")
class GreedyTiesHigh(NumpyBackend):
    """Of equal logits, greedy takes the highest id."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        x = np.where(allowed(batch, logits.shape), logits, -np.inf)[:, ::-1]
        return np.where(
            batch.temperature == 0, x.shape[1] - 1 - x.argmax(axis=1), super().sample(logits, batch)
        ).astype(np.int32)


@sabotage("L1/sample/grid")
class GreedyByFirstRow(NumpyBackend):
    """A batch whose first row is greedy is greedy."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        greedy = batch.temperature[0] == 0
        return super().sample(logits, replace(batch, temperature=batch.temperature * (not greedy)))


@sabotage("L1/sample/mask")
class BitmaskWordOff(NumpyBackend):
    """Words of the mask are taken one too early."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        mask = None if batch.mask is None else np.roll(batch.mask, -1, axis=1)
        return super().sample(logits, replace(batch, mask=mask))


@sabotage("L1/sample/mask")
class MaskIgnoredWhenGreedy(NumpyBackend):
    """Greedy rows know no mask."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        if batch.mask is None:
            return super().sample(logits, batch)
        mask = np.where((batch.temperature == 0)[:, None], -1, batch.mask).astype(np.int32)
        return super().sample(logits, replace(batch, mask=mask))


@sabotage("L1/sample/adjust")
class AdjustIgnored(NumpyBackend):
    """Logits are not adjusted."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return super().sample(logits, replace(batch, adjust=None))


@sabotage("L1/sample/adjust")
class AdjustAddsOnly(NumpyBackend):
    """The factor of an adjustment is ignored."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        a = batch.adjust
        return super().sample(logits, replace(batch, adjust=a and replace(a, factor=np.ones_like(a.factor))))


@sabotage("L1/sample/adjust")
class AdjustDividesAll(NumpyBackend):
    """A factor divides logits below zero too, which makes them likelier."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        if (a := batch.adjust) is not None:
            factor = np.where(logits[a.row, a.id] > 0, a.factor, 1 / a.factor).astype(np.float32)
            batch = replace(batch, adjust=replace(a, factor=factor))
        return super().sample(logits, batch)


@sabotage("L1/sample/adjust")
class AdjustInFirstRow(NumpyBackend):
    """All adjustments are made in the first row."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        a = batch.adjust
        return super().sample(logits, replace(batch, adjust=a and replace(a, row=np.zeros_like(a.row))))


@sabotage("L1/logprobs")
class LogitsAdjustedInPlace(NumpyBackend):
    """Sampling adjusts the logits themselves, and log probabilities are of what it leaves."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        out = super().sample(logits, batch)
        logits[:] = adjusted(logits, batch)
        return out


@sabotage("L1/logprobs")
class LogitsScaledInPlace(NumpyBackend):
    """Sampling divides the logits themselves, and log probabilities are of what it leaves."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        out = super().sample(logits, batch)
        logits /= np.where(batch.temperature > 0, batch.temperature, 1)[:, None]
        return out


@sabotage("L1/logprobs")
class LogitsMaskedInPlace(NumpyBackend):
    """Sampling masks the logits themselves, and log probabilities are of what it leaves."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        out = super().sample(logits, batch)
        logits[~allowed(batch, logits.shape)] = -np.inf
        return out


@sabotage("L1/logprobs")
class LogprobsAscending(NumpyBackend):
    """The best come last."""

    def logprobs(self, logits: Array, tokens: Array, top: int) -> LogProbs:
        got = super().logprobs(logits, tokens, top)
        return replace(got, ids=got.ids[:, ::-1], values=got.values[:, ::-1])


@sabotage("L1/logprobs")
class LogprobsOfTop(NumpyBackend):
    """Probabilities are normalised over the best alone."""

    def logprobs(self, logits: Array, tokens: Array, top: int) -> LogProbs:
        got = super().logprobs(logits, tokens, top)
        over: Any = np.log(np.exp(got.values).sum(axis=1)).astype(np.float32)
        return replace(got, chosen=got.chosen - over, values=got.values - over[:, None])


@sabotage("L1/logprobs")
class LogprobsNarrow(NumpyBackend):
    """Log probabilities are rounded to bfloat16."""

    def logprobs(self, logits: Array, tokens: Array, top: int) -> LogProbs:
        got = super().logprobs(logits, tokens, top)
        return replace(got, values=got.values.astype(HOST_DTYPES["bfloat16"]).astype(np.float32))
