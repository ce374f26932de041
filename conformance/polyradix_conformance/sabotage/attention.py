"""Attention that reads, masks or writes wrongly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from polyradix.backend.batch import HostBatch
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import NumpyMeta, NumpyOps
from polyradix.backend.protocol import HOST_DTYPES, Array, AttnSpec
from polyradix_conformance.sabotage import sabotage


def changed(m: NumpyMeta, **fields: Any) -> NumpyMeta:
    return NumpyMeta(replace(m.batch, **fields), m._prev)


@sabotage("L1/attend/whole/normal")
class MaskOffByOne(NumpyOps):
    """Every query sees one key too many."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        return super()._attend_row(q, keys, values, min(position + 1, len(keys) - 1), a)


@sabotage("L1/attend/whole/normal")
class MaskShort(NumpyOps):
    """A query does not see its own key."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        return super()._attend_row(q, keys, values, max(position - 1, 0), a)


@sabotage("L1/attend/whole/normal")
class NotCausal(NumpyOps):
    """The rows of one batch see each other in both directions."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        return super()._attend_row(q, keys, values, len(keys) - 1, a)


@sabotage("L1/attend/whole/normal")
class WrongGroup(NumpyOps):
    """Query head h reads kv head h % Hk instead of h // group."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        order = np.argsort(np.arange(a.heads.q) % a.heads.kv, kind="stable")
        out = np.empty((a.heads.q, a.heads.dim))
        out[order] = super()._attend_row(q[order], keys, values, position, a)
        return out


@sabotage("L1/attend/whole/")
class ScaleOff(NumpyOps):
    """Scores are 2 % too large."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        return super().attend(q, k, v, kv, m, replace(a, scale=a.scale * 1.02))


@sabotage("L1/attend/whole/window")
class WindowLong(NumpyOps):
    """A window keeps one key too many."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        return super().attend(q, k, v, kv, m, replace(a, window=a.window + 1 if a.window else None))


@sabotage("L1/attend/whole/window")
class WindowShort(NumpyOps):
    """A window of more than one keeps one key too few."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        return super().attend(q, k, v, kv, m, replace(a, window=max(a.window - 1, 1) if a.window else None))


@sabotage("L1/attend/whole/window")
class WindowIgnored(NumpyOps):
    """A window masks nothing."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        return super().attend(q, k, v, kv, m, replace(a, window=None))


@sabotage("L1/attend/decode/window")
class WindowIgnoredInDecode(NumpyOps):
    """The path for batches of one token per sequence knows no window."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        decode = len(q) == m.batch.num_seqs
        return super().attend(q, k, v, kv, m, replace(a, window=None) if decode else a)


@sabotage("L1/attend/whole/softcap")
class SoftcapIgnored(NumpyOps):
    """A softcap bends nothing."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        return super().attend(q, k, v, kv, m, replace(a, softcap=None))


@sabotage("L1/attend/whole/")
class SoftcapLeftOn(NumpyOps):
    """Scores are capped at 50 when nobody asks for it."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        return super().attend(q, k, v, kv, m, replace(a, softcap=a.softcap or 50.0))


@sabotage("L1/attend/whole/normal")
class SinkLeftOn(NumpyOps):
    """Softmax counts one more key, with a score and a value of zero."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        keys, values = (np.insert(x, 0, 0, axis=0) for x in (keys, values))
        return super()._attend_row(q, keys, values, position + 1, a)


@sabotage("L1/attend/whole/sinks")
class SinksIgnored(NumpyOps):
    """Sinks are no part of the softmax."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        return super().attend(q, k, v, kv, m, replace(a, sinks=None))


@sabotage("L1/attend/decode/sinks")
class SinksIgnoredInDecode(NumpyOps):
    """The path for batches of one token per sequence knows no sinks."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        decode = len(q) == m.batch.num_seqs
        return super().attend(q, k, v, kv, m, replace(a, sinks=None) if decode else a)


@sabotage("L1/attend/whole/sinks")
class SinksScaled(NumpyOps):
    """A sink is scaled as scores are."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        sinks = a.sinks and replace(a.sinks, value=a.sinks.value * np.float32(a.scale))
        return super().attend(q, k, v, kv, m, replace(a, sinks=sinks))


@sabotage("L1/attend/whole/sinks")
class SinkOfTheFirstHead(NumpyOps):
    """All heads have the first one's sink."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        sinks = a.sinks and replace(a.sinks, value=np.full_like(a.sinks.value, a.sinks.value[0]))
        return super().attend(q, k, v, kv, m, replace(a, sinks=sinks))


@sabotage("L1/attend/whole/sinks-window-softcap")
class SinksCapped(NumpyOps):
    """A sink is capped as scores are."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        sinks = a.sinks and replace(a.sinks, value=self._capped(a.sinks.value, a.softcap))
        return super().attend(q, k, v, kv, m, replace(a, sinks=sinks))


@sabotage("L2/two_steps")
class SpecKept(NumpyOps):
    """The first AttnSpec that this backend saw is used ever after."""

    _first: AttnSpec | None = None

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        self._first = self._first or a
        return super().attend(q, k, v, kv, m, replace(self._first, heads=a.heads))


@sabotage("L1/attend/decode/normal")
class LostPartialPage(NumpyOps):
    """Whole pages only are read."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        whole = (position + 1) // 16 * 16
        return super()._attend_row(q, keys, values, whole - 1 if whole else position, a)


@sabotage("L1/attend/long")
class LostFarKeys(NumpyOps):
    """Keys from position 512 on are not read."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        return super()._attend_row(q, keys, values, min(position, 511), a)


@sabotage("L1/attend/long")
class SplitsAveraged(NumpyOps):
    """Partitions of 256 keys are merged without regard to their sums."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        if a.window is not None:
            return super()._attend_row(q, keys, values, position, a)
        at = range(0, position + 1, 256)
        rows = (super(SplitsAveraged, self)._attend_row(q, keys[i:], values[i:], min(position - i, 255), a) for i in at)
        return sum(rows) / len(at)


@sabotage("L1/attend/whole/normal")
class PagesSorted(NumpyOps):
    """A sequence's pages are read in the order of their ids."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        order = np.sort(np.where(m.batch.pages > 0, m.batch.pages, 2**31 - 1), axis=1)
        return super().attend(q, k, v, kv, changed(m, pages=np.where(order < 2**31 - 1, order, 0)), a)


@sabotage("L1/attend/chunked/normal")
class StalePages(NumpyBackend):
    """A page added to a sequence is seen one batch late."""

    _before: HostBatch | None = None

    def prepare(self, batch: HostBatch, prev: Array | None = None) -> NumpyMeta:
        stale, self._before = self._before, batch
        if stale is not None and len(stale.pages) == len(batch.pages):
            pages = np.zeros_like(batch.pages)
            pages[:, : stale.pages.shape[1]] = stale.pages[:, : pages.shape[1]]
            batch = replace(batch, pages=pages)
        return super().prepare(batch, prev)


@sabotage("L1/attend/whole/normal")
class ReadsBeforeWrite(NumpyOps):
    """The cache is read first and written afterwards."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        out, kv = super().attend(q, k, v, kv, changed(m, slots=np.zeros_like(m.batch.slots)), a)
        return out, super().attend(q, k, v, kv, m, a)[1]


@sabotage("L1/attend/whole/normal")
class NeighbourSlot(NumpyOps):
    """Keys and values go to the next slot of their page."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        size, slots = kv[0].shape[1], m.batch.slots
        return super().attend(q, k, v, kv, changed(m, slots=slots // size * size + (slots + 1) % size), a)


@sabotage("L2/written")
class PaddingWrites(NumpyOps):
    """Padding rows have slot -1, which is the last slot of the last page."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        kv[0][-1, -1], kv[1][-1, -1] = 0, 0
        return super().attend(q, k, v, kv, m, a)


@sabotage("L1/attend/chunked/normal")
class PositionFromRow(NumpyOps):
    """The mask takes a token's row in the batch for its position in the sequence."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        b = m.batch
        rows = np.arange(b.num_tokens) - np.repeat(b.cu_q[:-1], np.diff(b.cu_q))
        return super().attend(q, k, v, kv, changed(m, positions=rows), a)


@sabotage("L1/attend/dim-80")
class HeadDimTail(NumpyOps):
    """Scores leave out what is beyond a multiple of 32 dimensions."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        q = np.where(np.arange(a.heads.dim) < a.heads.dim // 32 * 32, q, 0)
        return super()._attend_row(q, keys, values, position, a)


@sabotage("L1/attend/whole/peaked")
class NarrowScores(NumpyOps):
    """Scores are rounded to bfloat16 before softmax."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        k, v = (np.repeat(x[: position + 1], a.heads.q // a.heads.kv, axis=1) for x in (keys, values))
        score = np.einsum("hd,lhd->hl", q.astype(np.float32), k) * a.scale
        p = np.exp((score - score.max(axis=1, keepdims=True)).astype(HOST_DTYPES["bfloat16"]).astype(np.float32))
        return np.einsum("hl,lhd->hd", p / p.sum(axis=1, keepdims=True), v)


@sabotage("L2/written")
class NarrowCache(NumpyOps):
    """The cache of a float32 model holds bfloat16."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        k, v = (x.astype(HOST_DTYPES["bfloat16"]).astype(x.dtype) for x in (k, v))
        return super().attend(q, k, v, kv, m, a)


@sabotage("L1/attend/whole/offset")
class ValuesSaturate(NumpyOps):
    """Values are cut off at 8."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        return super().attend(q, k, np.clip(v, -8, 8), kv, m, a)


@sabotage("L2/batching")
class AttentionVariant(NumpyOps):
    """Batch invariance is claimed, and a lone query row sums in another order than several."""

    _alone = False

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        self._alone = len(q) == 1
        return super().attend(q, k, v, kv, m, a)

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        if self._alone and a.window is None:
            keys, values = keys[position::-1], values[position::-1]
        return super()._attend_row(q, keys, values, position, a)
