"""Sparse attention whose indexer caches, scores or selects wrongly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import Arr, NumpyMeta, NumpyOps, Packed
from polyradix.backend.protocol import HOST_DTYPES, Index, IndexSpec, LatentSpec, LatentWeights
from polyradix_conformance.sabotage import sabotage

LayerKV = tuple[Arr]


class Changed(NumpyOps):
    """Sparse attention by other specs, or another index."""

    def attend_sparse(
        self, q: Arr, c: Arr, x: Index, kv: LayerKV, m: NumpyMeta, w: LatentWeights, a: LatentSpec, s: IndexSpec
    ) -> tuple[Arr, LayerKV]:
        return super().attend_sparse(q, c, self._index(x, s, a), kv, m, w, a, self._spec(s))

    def _index(self, x: Index, s: IndexSpec, a: LatentSpec) -> Index:
        return x

    def _spec(self, s: IndexSpec) -> IndexSpec:
        return s


@sabotage("L1/attend_sparse/whole/spread")
class SparseSeesAll(Changed):
    """Nothing is selected: every row is seen."""

    def _spec(self, s: IndexSpec) -> IndexSpec:
        return replace(s, top_k=1 << 30)


@sabotage("L1/attend_sparse/top-1")
class SparseOneTooMany(Changed):
    """One row more than was asked for is seen."""

    def _spec(self, s: IndexSpec) -> IndexSpec:
        return replace(s, top_k=s.top_k + 1)


@sabotage("L2/sparse/written")
class IndexEpsOfOwn(Changed):
    """The norm of keys has an eps of its own."""

    def _spec(self, s: IndexSpec) -> IndexSpec:
        return replace(s, eps=1e-5)


@sabotage("L1/attend_sparse/whole/spread")
class IndexWeightsIgnored(Changed):
    """All heads of the indexer count the same."""

    def _index(self, x: Index, s: IndexSpec, a: LatentSpec) -> Index:
        return replace(x, weights=np.ones_like(x.weights))


@sabotage("L1/attend_sparse/whole/spread")
class IndexTurnsLast(Changed):
    """The last columns of the indexer's queries and keys are rotated, as in latent attention."""

    def _index(self, x: Index, s: IndexSpec, a: LatentSpec) -> Index:
        q = np.roll(x.q.reshape(len(x.q), s.heads, s.dim), a.rope, axis=2).reshape(x.q.shape)
        rolled = replace(x.norm, value=np.roll(x.norm.value, a.rope), bias=np.roll(x.norm.bias, a.rope))
        return replace(x, q=q, k=np.roll(x.k, a.rope, axis=1), norm=rolled)


@sabotage("L1/attend_sparse/whole/spread")
class IndexPairsInterleaved(Changed):
    """Rotated columns of the indexer's queries are taken for pairs side by side."""

    def _index(self, x: Index, s: IndexSpec, a: LatentSpec) -> Index:
        q = x.q.reshape(len(x.q), s.heads, s.dim).copy()
        pairs = q[..., : a.rope].reshape(len(q), s.heads, -1, 2)
        q[..., : a.rope] = pairs.swapaxes(2, 3).reshape(len(q), s.heads, -1)
        return replace(x, q=q.reshape(x.q.shape))


@sabotage("L2/sparse/written")
class IndexNormKeepsMean(NumpyOps):
    """Keys of the indexer are normed as latents are, with their mean."""

    def _layer_norm(self, x: Arr, w: Packed, eps: float) -> Arr:
        return (self.rms_norm(x, w, eps) + w.bias).astype(x.dtype)


@sabotage("L2/sparse/written")
class IndexBiasLost(NumpyOps):
    """The norm of keys has no bias."""

    def _layer_norm(self, x: Arr, w: Packed, eps: float) -> Arr:
        return super()._layer_norm(x, replace(w, bias=None), eps)


@sabotage("L1/attend_sparse/whole/ties")
class TiesGoToTheLast(NumpyOps):
    """Of rows with equal scores the newest are seen."""

    def _selected(self, q: Arr, weights: Arr, keys: Arr, top_k: int) -> Arr:
        return np.sort(len(keys) - 1 - super()._selected(q, weights, keys[::-1], top_k))


@sabotage("L1/attend_sparse/whole/spread")
class NegativeScoresCount(NumpyOps):
    """A head's product counts when it is negative, too."""

    def _selected(self, q: Arr, weights: Arr, keys: Arr, top_k: int) -> Arr:
        score = weights @ (q @ keys.T)
        return np.sort(np.argsort(-score, kind="stable")[:top_k])


@sabotage("L3/deepseek-v3.2/whole")
class ScoresNarrow(NumpyOps):
    """Scores are rounded to bfloat16, and some become equal."""

    def _selected(self, q: Arr, weights: Arr, keys: Arr, top_k: int) -> Arr:
        score = (weights @ np.maximum(q @ keys.T, 0)).astype(HOST_DTYPES["bfloat16"]).astype(np.float32)
        return np.sort(np.argsort(-score, kind="stable")[:top_k])


@sabotage("L1/attend_sparse/whole/equal")
class OwnRowAlwaysSeen(NumpyOps):
    """A token sees itself, whatever its score."""

    def _selected(self, q: Arr, weights: Arr, keys: Arr, top_k: int) -> Arr:
        seen = super()._selected(q, weights, keys, top_k)
        return np.union1d(seen[:-1], [len(keys) - 1]).astype(seen.dtype)


@sabotage("L1/attend_sparse/whole/spread")
class SelectsPages(NumpyOps):
    """Rows are selected by eights."""

    def _selected(self, q: Arr, weights: Arr, keys: Arr, top_k: int) -> Arr:
        seen = super()._selected(q, weights, keys, top_k)
        return np.flatnonzero(np.isin(np.arange(len(keys)) // 8, seen // 8))


@sabotage("L1/attend_sparse/temperature")
class TemperatureOfSelection(NumpyOps):
    """A token's temperature is that of the number of rows that it sees."""

    def _latent_row(self, nope: Arr, rope: Arr, held: Arr, position: int, up: Arr, a: LatentSpec) -> Arr:
        return super()._latent_row(nope, rope, held, min(position, len(held) - 1), up, a)


@sabotage("L2/sparse/moved")
class KeysStayBehind(NumpyBackend):
    """Imported pages have no keys of the indexer."""

    def alloc_kv(self, spec: Any, pages: int) -> Any:
        self._index = spec.index
        return super().alloc_kv(spec, pages)

    def _write(self, kv: Any, pages: list[int], data: Arr) -> Any:
        kept = np.arange(data.shape[-1]) < data.shape[-1] - self._index
        return super()._write(kv, pages, np.where(kept, data, 0).astype(data.dtype))
