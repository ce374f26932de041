"""Backends with one defect each, made from the NumPy one. A suite that passes any of them is not worth running."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from polyradix.backend.batch import HostBatch, SampleBatch
from polyradix.backend.numpy.backend import NumpyBackend
from polyradix.backend.numpy.ops import NumpyMeta, NumpyOps
from polyradix.backend.protocol import KV, Array, AttnSpec, HostArray


class MaskOffByOne(NumpyOps):
    """Every query sees one key too many."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        return super()._attend_row(q, keys, values, min(position + 1, len(keys) - 1), a)


class WrongGroup(NumpyOps):
    """Query head h reads kv head h % Hk instead of h // group."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        order = np.argsort(np.arange(a.heads.q) % a.heads.kv, kind="stable")
        out = np.empty((a.heads.q, a.heads.dim))
        out[order] = super()._attend_row(q[order], keys, values, position, a)
        return out


class SwappedHalves(NumpyOps):
    """Rope turns the wrong way."""

    def _rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        return super()._rotate(x, cos, -sin)


class Interleaved(NumpyOps):
    """Rope pairs dimension 2 i with 2 i + 1."""

    def _rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        split = super()._rotate(np.concatenate([x[..., ::2], x[..., 1::2]], axis=-1), cos, sin)
        return np.stack(np.split(split, 2, axis=-1), axis=-1).reshape(x.shape)


class ScaleOff(NumpyOps):
    """Scores are 2 % too large."""

    def attend(self, q: Any, k: Any, v: Any, kv: Any, m: NumpyMeta, a: AttnSpec) -> Any:
        return super().attend(q, k, v, kv, m, replace(a, scale=a.scale * 1.02))


class LostPartialPage(NumpyOps):
    """A decode reads whole pages only."""

    def _attend_row(self, q: Any, keys: Any, values: Any, position: int, a: AttnSpec) -> Any:
        whole = (position + 1) // 16 * 16
        return super()._attend_row(q, keys, values, whole - 1 if whole else position, a)


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


class AliasedCopy(NumpyBackend):
    """A copied page stays the source's: what is written to one shows in the other."""

    def copy_pages(self, kv: KV, src: Sequence[int], dst: Sequence[int]) -> KV:
        self._aliases = list(zip(src, dst, strict=True))
        return super().copy_pages(kv, src, dst)

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        source = {d: s for s, d in getattr(self, "_aliases", [])}
        return super().export_pages(kv, [source.get(p, p) for p in pages])


class SeedIgnored(NumpyBackend):
    """Noise depends on the position alone."""

    def sample(self, logits: Array, batch: SampleBatch) -> Array:
        return super().sample(logits, replace(batch, seed=np.zeros_like(batch.seed)))


class LostLayer(NumpyBackend):
    """An export holds the first layer twice and the last not at all."""

    def export_pages(self, kv: KV, pages: Sequence[int]) -> Future[HostArray]:
        return super().export_pages([*kv[:-1], kv[0]], pages)


def _build(kind: type[Any]) -> NumpyBackend:
    if issubclass(kind, NumpyBackend):
        return kind("float32", False)
    backend = NumpyBackend("float32", False)
    backend.ops = kind(backend._wide, backend._store)
    return backend


KINDS: tuple[type[Any], ...] = (
    MaskOffByOne,
    StalePages,
    WrongGroup,
    SwappedHalves,
    Interleaved,
    ScaleOff,
    LostPartialPage,
    AliasedCopy,
    SeedIgnored,
    LostLayer,
)

SABOTAGES: dict[str, Callable[[], NumpyBackend]] = {k.__name__: partial(_build, k) for k in KINDS}
