"""Tensor parallelism that mixes up, loses or repeats what the ranks hold. On one rank each of these is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from polyradix.backend.numpy.mesh import NumpyCollectives, NumpyMesh
from polyradix.backend.numpy.ops import Arr, NumpyOps, Packed
from polyradix.backend.protocol import ParamSpec, Reader
from polyradix_conformance.sabotage import sabotage


@sabotage("L1/all_reduce", mesh=True)
class ReduceMissing(NumpyCollectives):
    """all_reduce gives every rank its own part."""

    def all_reduce(self, x: Arr) -> Arr:
        return x


@sabotage("L1/all_reduce", mesh=True)
class ReduceTwice(NumpyCollectives):
    """all_reduce sums the sums."""

    def all_reduce(self, x: Arr) -> Arr:
        return super().all_reduce(super().all_reduce(x))


@sabotage("L1/all_reduce", mesh=True)
class ReduceInOwnOrder(NumpyCollectives):
    """Each rank sums from its own part on, so that ranks differ in their last bits."""

    def _sum(self, xs: list[Arr]) -> Arr:
        return super()._sum(xs[self.ranks.rank :] + xs[: self.ranks.rank])


@sabotage("L1/all_gather", mesh=True)
class GatherReversed(NumpyCollectives):
    """all_gather joins the parts from the last rank to the first."""

    def all_gather(self, x: Arr, axis: int) -> Arr:
        return np.concatenate(self._exchange("all_gather", x)[::-1], axis)


@sabotage("L1/reduce_scatter", mesh=True)
class ScatterShifted(NumpyCollectives):
    """reduce_scatter gives a rank the part of the next."""

    def reduce_scatter(self, x: Arr, axis: int) -> Arr:
        parts = np.split(self._sum(self._exchange("reduce_scatter", x)), self.size, axis)
        return parts[(self.ranks.rank + 1) % self.size]


@sabotage("L1/all_to_all", mesh=True)
class AllToAllReversed(NumpyCollectives):
    """all_to_all joins what it received from the last rank to the first."""

    def all_to_all(self, x: Arr, axis: int) -> Arr:
        return np.concatenate([self._part(y, axis) for y in self._exchange("all_to_all", x)[::-1]], axis)


@sabotage("L1/broadcast", mesh=True)
class BroadcastFromFirst(NumpyCollectives):
    """broadcast is from rank 0, whatever the root."""

    def broadcast(self, x: Arr, root: int) -> Arr:
        return super().broadcast(x, 0)


@sabotage("L1/permute", mesh=True)
class PermuteInverse(NumpyCollectives):
    """permute receives from where it should send to."""

    def permute(self, x: Arr, to: Sequence[int]) -> Arr:
        return self._exchange("permute", x)[to[self.ranks.rank]]


@sabotage("L1/linear_reduce/bias/tp", mesh=True)
class BiasPerRank(NumpyOps):
    """Every rank adds the bias before the parts are summed."""

    def linear_reduce(self, x: Arr, w: Packed) -> Arr:
        times = self._collectives.size if w.spec.shard_axis is not None else 1
        return super().linear_reduce(x, w if w.bias is None else replace(w, bias=times * w.bias))


@sabotage("L1/linear_reduce/tp", mesh=True)
class ReduceForgotten(NumpyOps):
    """linear_reduce gives a rank's own part."""

    def linear_reduce(self, x: Arr, w: Packed) -> Arr:
        return self.linear(x, w)


@sabotage("L1/logits/tp", mesh=True)
class LogitsPadded(NumpyOps):
    """Logits keep the rows that pad the vocabulary to a multiple of the ranks."""

    def logits(self, x: Arr, w: Packed, softcap: float | None = None) -> Arr:
        short = -w.spec.shape[0] % self._collectives.size
        return np.pad(super().logits(x, w, softcap), ((0, 0), (0, short)))


@sabotage("L1/qkv/tp", mesh=True)
class SegmentsIgnored(NumpyMesh):
    """q, k and v are split over ranks as one."""

    def pack(self, spec: ParamSpec, read: Reader) -> Any:
        return super().pack(replace(spec, segments=()), read)


@sabotage("L2/exported/tp", mesh=True)
class ExportRanksReversed(NumpyMesh):
    """An export has the heads of the last rank first, and an import takes them so."""

    def _export(self, kv: Any, pages: list[int]) -> Arr:
        return super()._export(kv[::-1], pages)

    def _write(self, kv: Any, pages: list[int], data: Arr) -> Any:
        return super()._write(kv[::-1], pages, data)[::-1]


@sabotage("L1/attend/decode/tp", mesh=True)
class CacheOfFirstRank(NumpyMesh):
    """All ranks write and read the cache of the first."""

    def _on_all_ranks(self, step: Any, ops: Any, params: Any, kv: Any, m: Any) -> Any:
        logits, _ = super()._on_all_ranks(step, ops, params, [kv[0]] * len(kv), m)
        return logits, kv
