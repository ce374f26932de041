"""What is timed: one compiled step run again and again on one batch, each run on the cache that the last one returned.

The launches of a chain depend on each other through the cache, so that fetching the result of the last one waits for
all of them, whether a backend launches asynchronously or not. Every launch prepares its batch, as the engine does.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from polyradix.backend.batch import HostBatch
from polyradix.backend.capabilities import Unsupported
from polyradix.backend.protocol import Heads, KVSpec, Limits, Params
from polyradix_conformance.inputs import Part, Ragged
from polyradix_conformance.oracle import EXACT, HOST, Arr, emulated
from polyradix_conformance.perf.truth import Formula
from polyradix_conformance.rig import Mismatch, Rig
from polyradix_conformance.tolerance import floor

WAIT = 600  # seconds for one chain
COLUMNS = 64  # of a result that are read back
CONTENTS = 3  # different layers of cache, used in turn
TINY = Heads(1, 1, 64)  # of the cache of a step that does not attend

Chain = Callable[[int], Arr]  # launches so many times, then fetches the last result


@dataclass(frozen=True)
class Subject:
    """A chain ready to be timed. `many` makes `calls` calls per launch more than `few` does (than nothing, if None).
    `check` raises Mismatch for a fetched result of `many` that is wrong."""

    many: Chain
    check: Callable[[Arr], None]
    calls: int = 1
    few: Chain | None = None


@dataclass(frozen=True)
class Shape:
    """`seqs` sequences of `context` tokens, the newest `new` of which are in the batch."""

    seqs: int
    new: int
    context: int

    @property
    def rows(self) -> int:
        return self.seqs * self.new

    @property
    def checked(self) -> list[int]:
        """The first, the middle and the last sequence."""
        return sorted({0, self.seqs // 2, self.seqs - 1})

    @property
    def last_rows(self) -> list[int]:
        return [s * self.new + self.new - 1 for s in self.checked]

    def ragged(self, page: int) -> Ragged:
        return Ragged((self.context,) * self.seqs, page, spare=0)

    def batch(self, ragged: Ragged) -> HostBatch:
        """Row t has token t."""
        out = ragged.batch([Part(s, self.context - self.new, self.context) for s in range(self.seqs)])
        out.tokens[:] = np.arange(self.rows)
        return out


def rows_shape(rows: int, after: int = 0) -> Shape:
    """One token each of up to 64 sequences, or a prefill of 16; `after` so many tokens in the cache."""
    seqs = rows if rows <= 64 else 16
    return Shape(seqs, rows // seqs, after + rows // seqs)


def normal(seed: str, shape: tuple[int, ...], dtype: str, scale: float = 1.0, offset: float = 0.0) -> Arr:
    """Normal numbers, held in `dtype`."""
    x = np.random.default_rng(zlib.crc32(seed.encode())).standard_normal(shape, np.float32)
    return (x * np.float32(scale) + np.float32(offset)).astype(HOST[dtype])


def weights(seed: str, out: int, into: int, dtype: str) -> Arr:
    """[out,into], which keep the size of what they multiply."""
    return normal(seed, (out, into), dtype, into**-0.5)


def picked(width: int) -> Arr:
    """The columns of a result that are read back, spread evenly."""
    return np.arange(min(COLUMNS, width)) * (width // min(COLUMNS, width))


class Caches:
    """What sequences have in the cache: layer i has one of a few contents, turned by s columns for sequence s."""

    def __init__(self, heads: Heads, context: int, dtype: str) -> None:
        self.contents = CONTENTS
        self._base = normal("cache", (CONTENTS, 2, context, heads.kv, heads.dim), dtype)

    def of(self, layer: int, seq: int) -> Arr:
        """[2,context,Hk,D]: k and v."""
        return np.roll(self._base[layer % CONTENTS], seq, axis=-1)

    def fill(self, rig: Rig, kv: Any, ragged: Ragged, layers: int) -> Any:
        for seq, pages in enumerate(ragged.pages):
            different = [self._paged(self.of(i, seq), ragged.page) for i in range(min(layers, CONTENTS))]
            data = np.stack([different[i % CONTENTS] for i in range(layers)], axis=1)
            kv = rig.backend.import_pages(kv, pages.tolist(), data)
        return kv

    def _paged(self, data: Arr, page: int) -> Arr:
        padded = np.pad(data, ((0, 0), (0, -data.shape[1] % page), (0, 0), (0, 0)))
        return padded.reshape(2, -1, page, *data.shape[2:])


def alloc(rig: Rig, pages: int, heads: Heads, layers: int) -> Any:
    """A cache. Raises Unsupported when it would take more than nine tenths of the free memory."""
    spec = KVSpec(layers, heads.kv, heads.dim, rig.page, rig.dtype)
    free = rig.backend.memory().free
    needed = pages * rig.backend.kv_page_bytes(spec)
    if needed > 0.9 * free:
        raise Unsupported("memory", f"the cache takes {needed / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free")
    return rig.backend.alloc_kv(spec, pages)


class Program:
    """A compiled step with its parameters, its cache and its batch."""

    def __init__(self, rig: Rig, step: Any, params: Params, shape: Shape, heads: Heads, caches: Caches | None) -> None:
        ragged, layers = shape.ragged(rig.page), max(1, len(params.layers))
        self._backend, self._params, self._batch = rig.backend, params, shape.batch(ragged)
        self._kv = alloc(rig, ragged.num_pages, heads, layers)
        if caches is not None:
            self._kv = caches.fill(rig, self._kv, ragged, layers)
        self._run = rig.backend.compile(step, Limits(shape.rows, shape.seqs, shape.context))

    def launch(self) -> Any:
        out, self._kv = self._run(self._params, self._kv, self._backend.prepare(self._batch))
        return out

    def __call__(self, times: int) -> Arr:
        for _ in range(times):
            out = self.launch()
        return self._backend.fetch(out).result(timeout=WAIT)


def checker(rig: Rig, shape: Shape, formula: Formula, final: bool = False) -> Callable[[Arr], None]:
    """Compares the rows of `shape.checked` in a fetched result with formula(p) [rows,width], of which `picked` columns
    were read back, or with `final`, all."""

    def check(got: Arr) -> None:
        truth, *others = map(formula, (EXACT, *emulated(rig.dtype)))
        columns = np.arange(truth.shape[1]) if final else picked(truth.shape[1])
        if got.shape != (shape.seqs, len(columns)):
            raise Mismatch(f"fetched an array of shape {got.shape}; expected {(shape.seqs, len(columns))}")
        floors = floor(truth, others, "float32" if final else rig.dtype)
        rig.close("after the timing", got[shape.checked].astype(np.float64), truth[:, columns], floors)

    return check
