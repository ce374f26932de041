"""Caches, batches and handles that mix up what belongs to whom, or when."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import NumpyMeta, NumpyOps
from polyradix.backend.protocol import HOST_DTYPES, KV, Array, Compiled, HostArray, KVSpec, Limits, Step
from polyradix_conformance.sabotage import sabotage


class Late(Future[Any]):
    """Computes when it is asked, not when it is made."""

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self._fn = fn

    def result(self, timeout: float | None = None) -> Any:
        return self._fn()


@sabotage("L2/copied")
class CopyAliased(NumpyBackend):
    """A copied page stays the source's: what is written to one shows in the other."""

    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> KV:
        self._aliases = list(zip(src, dst, strict=True))
        return super().copy_pages(kv, src, dst)

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        source = {d: s for s, d in getattr(self, "_aliases", [])}
        return super().export_pages(kv, [source.get(p, p) for p in pages])


@sabotage("L2/copied")
class CopyBackwards(NumpyBackend):
    """A copy goes from dst to src."""

    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> KV:
        return super().copy_pages(kv, dst, src)


@sabotage("L2/copied", "L2/meta/copy")
class CopySorted(NumpyBackend):
    """The destinations of a copy are taken in the order of their ids."""

    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> KV:
        return super().copy_pages(kv, src, sorted(dst))


@sabotage("L2/copied")
class CopyLosesValues(NumpyBackend):
    """A copy takes keys alone."""

    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> KV:
        super().copy_pages([(k, k) for k, _ in kv], src, dst)
        return kv


@sabotage("L2/moved")
class ExportLosesLayer(NumpyBackend):
    """An export holds the first layer twice and the last not at all."""

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        return super().export_pages([*kv[:-1], tuple(x.copy() for x in kv[0])], pages)


@sabotage("L2/written")
class ExportSwapsKV(NumpyBackend):
    """An export has v first and k second, and so has an import."""

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        return super().export_pages([(v, k) for k, v in kv], pages)

    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> KV:
        return super().import_pages(kv, pages, data[::-1])


@sabotage("L2/written")
class ExportHeadMajor(NumpyBackend):
    """An export and an import have the slots of a head side by side instead of the heads of a slot."""

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        data = super().export_pages(kv, pages).result()
        return self._launch.future(lambda x: x.swapaxes(3, 4).reshape(x.shape), data)

    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> KV:
        turned = data.reshape(*data.shape[:3], data.shape[4], data.shape[3], data.shape[5]).swapaxes(3, 4)
        return super().import_pages(kv, pages, turned)


@sabotage("L2/exported_then_written")
class ExportLate(NumpyBackend):
    """An export reads the cache when its result is asked for."""

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        read = super().export_pages
        return Late(lambda: read(kv, pages).result())


@sabotage("L0/results")
class ExportWide(NumpyBackend):
    """An export of bfloat16 comes as float32."""

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        return self._launch.future(lambda x: x.astype(np.float32), super().export_pages(kv, pages).result())


@sabotage("L2/meta/offload")
class NothingRounded(NumpyBackend):
    """bfloat16 activations and cache are kept in float32, so that only an export rounds.

    Activations alone may stay wide, as fused kernels keep them: errors only shrink. A cache may not, for what comes
    back from an export is then not what went out.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._store = dict.fromkeys(self._store, self._wide)
        self.ops = NumpyOps(self._wide, self._store)

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        self._dtype = HOST_DTYPES[spec.dtype]
        return super().alloc_kv(spec, pages)

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        return self._launch.future(lambda x: x.astype(self._dtype), super().export_pages(kv, pages).result())


@sabotage("L2/moved")
class ImportSorted(NumpyBackend):
    """An import takes its pages in the order of their ids."""

    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> KV:
        return super().import_pages(kv, sorted(pages), data)


@sabotage("L2/moved")
class ImportShort(NumpyBackend):
    """An import leaves out the last of several pages."""

    def import_pages(self, kv: KV, pages: Sequence[int], data: HostArray) -> KV:
        n = max(len(pages) - 1, 1)
        return super().import_pages(kv, pages[:n], data[:, :, :n])


@sabotage("L2/zeroed")
class AllocDirty(NumpyBackend):
    """A new cache holds what was in memory."""

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        kv = super().alloc_kv(spec, pages)
        kv[-1][1][-1, -1] = 1
        return kv


@sabotage("L3/llama/rebound")
class ParamsKept(NumpyBackend):
    """A compiled step keeps the parameters of its first call."""

    def compile(self, step: Step, limits: Limits) -> Compiled:
        kept: list[Any] = []

        def run(params: Any, kv: KV, meta: Any) -> Any:
            kept.append(params)
            return compiled(kept[0], kv, meta)

        compiled = super().compile(step, limits)
        return run


@sabotage("L1/sample/grid")
class StaleBatch(NumpyBackend):
    """A batch of the same size as the one before is taken for it."""

    _before: NumpyMeta | None = None

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> NumpyMeta:
        stale, self._before = self._before, super().prepare(batch, prev)
        if stale is None or (stale.batch.num_tokens, stale.batch.num_seqs) != (batch.num_tokens, batch.num_seqs):
            return self._before
        return stale


@sabotage("L2/meta/interleave")
class RowsRemembered(NumpyBackend):
    """A batch of as many sequences as the one before, all longer, is taken for its continuation: known pages stay."""

    _before: HostBatch | None = None

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> NumpyMeta:
        old, self._before = self._before, batch
        if old is None or len(old.kv_len) != len(batch.kv_len) or (old.kv_len >= batch.kv_len).any():
            return super().prepare(batch, prev)
        known = np.pad(old.pages, ((0, 0), (0, max(batch.pages.shape[1] - old.pages.shape[1], 0))))
        known = known[:, : batch.pages.shape[1]]
        return super().prepare(replace(batch, pages=np.where(known > 0, known, batch.pages)), prev)


@sabotage("L2/linked")
class FromPrevIgnored(NumpyBackend):
    """Tokens of the previous step's samples are taken from the host."""

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> NumpyMeta:
        return super().prepare(replace(batch, from_prev=np.full_like(batch.from_prev, -1)), prev)


@sabotage("L2/linked")
class FromPrevShifted(NumpyBackend):
    """Tokens come from the next row of the previous samples."""

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> NumpyMeta:
        shifted = np.where(batch.from_prev >= 0, (batch.from_prev + 1) % len(prev if prev is not None else [0]), -1)
        return super().prepare(replace(batch, from_prev=shifted.astype(np.int32)), prev)


@sabotage("L0/results")
class FetchPadded(NumpyBackend):
    """A fetch brings the rows of padding along."""

    def fetch(self, x: Array) -> Future[HostArray]:
        return super().fetch(np.pad(x, [(0, -len(x) % 8)] + [(0, 0)] * (x.ndim - 1)))


@sabotage("L2/fetched_later")
class SamplesReused(NumpyBackend):
    """Samples are fetched late, from a buffer that the next step writes too."""

    _buffer = np.zeros(0, np.int32)

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        got = super().sample(logits, batch)
        if len(got) > len(self._buffer):
            self._buffer = np.zeros(len(got), np.int32)
        self._buffer[: len(got)] = got
        return self._buffer[: len(got)]

    def fetch(self, x: Array) -> Future[HostArray]:
        return Late(x.copy)


@sabotage("L2/moved", "L2/written", "L2/meta")
class CacheShared(NumpyBackend):
    """Two caches of one shape are one cache."""

    _kept: tuple[KVSpec, int, KV] | None = None

    def alloc_kv(self, spec: KVSpec, pages: int) -> KV:
        if self._kept is None or self._kept[:2] != (spec, pages):
            self._kept = spec, pages, super().alloc_kv(spec, pages)
        for pair in self._kept[2]:
            for x in pair:
                x[:] = 0
        return self._kept[2]


@sabotage("L2/last_layer")
class LayersShared(NumpyOps):
    """Every layer writes and reads the cache of the first."""

    def layers(self, bodies: Any, params: Any, carry: Any, kv: Any) -> Any:
        carry, out = super().layers(bodies, params, carry, [kv[0]] * len(kv))
        return carry, [out[0], *kv[1:]]
