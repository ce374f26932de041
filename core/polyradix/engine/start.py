"""What happens before there is traffic: seconds by phase, and the batches that a backend runs first."""

from __future__ import annotations

import time

import numpy as np

from polyradix.backend.batch import HostBatch, SampleBatch, Table
from polyradix.backend.protocol import Limits


class Timeline:
    """Seconds of each phase, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def done(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now

    def __str__(self) -> str:
        parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        return f"started in {sum(self.seconds.values()):.1f} s: {parts}"


def largest(limits: Limits, page_size: int, groups: int = 1) -> tuple[HostBatch, int]:
    """The prefill of as many tokens as the limits allow, in as many sequences, evenly; and its pages, with page 0."""
    seqs = min(limits.max_seqs, limits.max_tokens)
    total = min(limits.max_tokens, seqs * limits.max_context)
    return prefill(np.full(seqs, total // seqs) + (np.arange(seqs) < total % seqs), page_size, groups)


def prefill(lengths: np.ndarray, page_size: int, groups: int = 1) -> tuple[HostBatch, int]:
    """The prefill of sequences of `lengths` [S] tokens 0 (of one each, a decode), in pages from 1 on, one group's after
    another's; and their end."""
    cu_q = np.concatenate([[0], np.cumsum(lengths)])
    counts = -(-lengths // page_size)
    column = np.arange(counts.max())
    positions = np.arange(cu_q[-1]) - np.repeat(cu_q[:-1], lengths)

    def table(group: int) -> Table:
        first = 1 + group * counts.sum() + np.cumsum(counts) - counts
        pages = np.where(column < counts[:, None], first[:, None] + column, 0)
        slots = np.repeat(first * page_size, lengths) + positions
        return Table(slots.astype(np.int32), pages.astype(np.int32))

    (slots, pages), *others = map(table, range(groups))
    none = np.full(len(positions), -1)
    parts = (0 * positions, positions, slots, cu_q, lengths, pages, cu_q[1:] - 1, none)
    batch = HostBatch(*(part.astype(np.int32) for part in parts), others=tuple(others))
    return batch, int(1 + groups * counts.sum())


def sampling(seqs: int, greedy: bool) -> SampleBatch:
    """Of `seqs` rows; when not greedy, with all that may narrow the choice."""
    whole, real = np.zeros(seqs, np.int32), np.ones(seqs, np.float32)
    if greedy:
        return SampleBatch(0 * real, whole, real, 0 * real, whole, whole)
    return SampleBatch(real, whole + 40, real * np.float32(0.9), real * np.float32(0.1), whole, whole)
