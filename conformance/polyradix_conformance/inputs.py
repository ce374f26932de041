"""Inputs of the cases: value regimes, ragged sequences, shuffled pages. All seeded, so an id names one exact test."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from polyradix.backend.batch import HostBatch
from polyradix_conformance.oracle import Arr, rounded

REGIMES = ("normal", "peaked", "offset", "outlier")
SCRATCH = 1  # page 0


def values(seed: str, shape: tuple[int, ...], dtype: str, regime: str = "normal") -> Arr:
    """Numbers of `dtype` as float64: normal, peaked (heavy-tailed), offset (far from zero) or outlier (few, huge)."""
    r = np.random.default_rng(zlib.crc32(seed.encode()))
    x = r.normal(size=shape)
    if regime == "peaked":
        x = x**3 * 2
    elif regime == "offset":
        x = x + 10
    elif regime == "outlier":
        x = np.where(r.random(size=shape) < 0.01, x * 100, x)
    return rounded(x, dtype)


def ragged_lengths(page: int) -> tuple[int, ...]:
    """1, around one page, a prime, and long."""
    return tuple(sorted({n for n in (1, page - 1, page, page + 1, 37, page + 70) if n > 0}))


@dataclass(frozen=True)
class Part:
    """Tokens start:stop of one sequence, to be run in one batch."""

    seq: int
    start: int
    stop: int


class Ragged:
    """Sequences with pages of their own, shuffled among each other. Token ids are row numbers over all sequences."""

    def __init__(self, lengths: tuple[int, ...], page: int, seed: int = 0, spare: int = 3) -> None:
        self.lengths = lengths
        self.page = page
        counts = [-(-n // page) for n in lengths]
        self.num_pages = SCRATCH + sum(counts) + spare
        order = np.random.default_rng(seed).permutation(np.arange(SCRATCH, self.num_pages))
        self.spare = [int(p) for p in order[sum(counts) :]]
        cuts = np.cumsum([0, *counts])
        self.pages = [order[a:b] for a, b in pairwise(cuts)]
        self.offsets = np.cumsum([0, *lengths])

    @property
    def rows(self) -> int:
        return int(self.offsets[-1])

    def slots(self, part: Part) -> Arr:
        at = np.arange(part.start, part.stop)
        out: Arr = self.pages[part.seq][at // self.page] * self.page + at % self.page
        return out

    def ids(self, part: Part) -> Arr:
        out: Arr = self.offsets[part.seq] + np.arange(part.start, part.stop)
        return out

    def rows_in(self, data: Arr, part: Part) -> Arr:
        """The rows of one part [2,layers,T,heads,dim], from the export of all pages of its sequence in their order."""
        rows = data.reshape(*data.shape[:2], -1, *data.shape[4:])
        out: Arr = rows[:, :, part.start : part.stop].astype(np.float64)
        return out

    def batch(self, parts: list[Part]) -> HostBatch:
        cu = np.cumsum([0, *(p.stop - p.start for p in parts)]).astype(np.int32)
        used = [-(-p.stop // self.page) for p in parts]
        pages = np.zeros((len(parts), max(used)), np.int32)
        for s, (p, n) in enumerate(zip(parts, used, strict=True)):
            pages[s, :n] = self.pages[p.seq][:n]
        return HostBatch(
            tokens=np.concatenate([self.ids(p) for p in parts]).astype(np.int32),
            positions=np.concatenate([np.arange(p.start, p.stop) for p in parts]).astype(np.int32),
            slots=np.concatenate([self.slots(p) for p in parts]).astype(np.int32),
            cu_q=cu,
            kv_len=np.array([p.stop for p in parts], np.int32),
            pages=pages,
            last=cu[1:] - 1,
            from_prev=np.full(cu[-1], -1, np.int32),
        )

    def whole(self) -> list[list[Part]]:
        """Every sequence in one batch."""
        return [[Part(s, 0, n) for s, n in enumerate(self.lengths)]]

    def decode(self) -> list[list[Part]]:
        """All but the last token, then one token each."""
        head = [Part(s, 0, n - 1) for s, n in enumerate(self.lengths) if n > 1]
        return [head, [Part(s, n - 1, n) for s, n in enumerate(self.lengths)]]

    def chunked(self) -> list[list[Part]]:
        """Chunks of 13 tokens, sequences in reverse order: none of the cuts is at a page's edge for long."""
        most = max(self.lengths)
        order = list(reversed(range(len(self.lengths))))
        steps = range(0, most, 13)
        return [[Part(s, i, min(i + 13, self.lengths[s])) for s in order if i < self.lengths[s]] for i in steps]

    def mixed(self) -> list[list[Part]]:
        """Every second sequence decodes its last token while the others prefill."""
        first = [Part(s, 0, n - 1) for s, n in enumerate(self.lengths) if s % 2 and n > 1]
        second = [Part(s, n - 1 if s % 2 else 0, n) for s, n in enumerate(self.lengths)]
        return [first, second]
