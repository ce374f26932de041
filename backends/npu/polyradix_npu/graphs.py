"""Decode steps captured as graphs, one for each of a few sizes. Attention takes the lengths of sequences from the host:
they are given to the graph before each replay, once the replay before has ended, as its tasks hold one set of them."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from polyradix.backend.batch import I32, HostBatch
from polyradix.backend.protocol import Array, Limits, Ops, Params, Step
from polyradix_npu.meta import Eager, NpuMeta, grouped, held

FIELDS = ("tokens", "positions", "from_prev")
OF_GROUP = ("slots", "newest")


def sizes(most: int) -> tuple[int, ...]:
    """Numbers of sequences that graphs are made for: powers of two, and `most`. A graph takes streams of a device that
    has few."""
    return (*(2**i for i in range((most - 1).bit_length())), most)


class StaticBatch:
    """What every graph reads, int32, in one buffer: FIELDS of limits.max_seqs sequences, and for each group of the
    cache OF_GROUP and their pages."""

    def __init__(self, limits: Limits, page: int, device: str, groups: int) -> None:
        self.limits, self.page, self.groups, self.sizes = limits, page, groups, sizes(limits.max_seqs)
        lines, pages = (len(FIELDS) + groups * len(OF_GROUP), limits.max_seqs), self._pages().shape
        self.buffer = torch.zeros(prod(lines) + prod(pages), dtype=torch.int32, device=device)
        self.lines = self.buffer[: prod(lines)].view(lines)
        self.pages = self.buffer[prod(lines) :].view(pages)

    def _pages(self) -> I32:
        wide = -(-self.limits.max_context // self.page)
        return np.zeros((self.groups, self.limits.max_seqs, wide), np.int32)

    def load(self, batch: HostBatch) -> Decode:
        """One copy. Rows beyond the batch decode position 0 of scratch page 0."""
        n, groups = batch.num_seqs, held(batch, self.page)
        rows, pages = np.zeros(self.lines.shape, np.int32), self._pages()
        rows[FIELDS.index("from_prev")] = -1
        given = [getattr(batch, name) for name in FIELDS]
        for table, group in zip(pages, groups, strict=True):
            given += [group.slots, group.kv_len - 1]
            table[:n, : group.pages.shape[1]] = group.pages
        for row, values in zip(rows, given, strict=True):
            row[:n] = values
        host = np.concatenate([rows.ravel(), pages.ravel()])
        self.buffer.copy_(torch.from_numpy(host), non_blocking=False)
        size = next(size for size in self.sizes if size >= n)
        return Decode(self, n, [group.kv_len.tolist() + [1] * (size - n) for group in groups])

    def captured(self, size: int) -> NpuMeta:
        """The first `size` rows, with lengths that fit any cache."""
        return self._meta([[1] * size] * self.groups, captured=True)

    def meta(self, batch: Decode) -> NpuMeta:
        """What was loaded."""
        return self._meta([lengths[: batch.seqs] for lengths in batch.kv_len])

    def _meta(self, kv_len: list[list[int]], captured: bool = False) -> NpuMeta:
        size = len(kv_len[0])
        tokens, positions, _, *of_group = self.lines[:, :size]
        last = torch.arange(size, dtype=torch.int32).to(self.buffer.device)
        slots, newest = of_group[::2], of_group[1::2]
        each = [
            {"slots": s, "newest": n, "pages": p[:size], "kv_len": lengths}
            for s, n, p, lengths in zip(slots, newest, self.pages, kv_len, strict=True)
        ]
        rows = list(range(size + 1))
        first = NpuMeta(tokens=tokens, positions=positions, last=last, rows=rows, captured=captured, **each[0])
        return grouped(first, each[1:])


@dataclass(frozen=True)
class Decode:
    """A batch that was loaded for a graph; `kv_len` has, for each group, a length for each of the graph's rows."""

    static: StaticBatch
    seqs: int
    kv_len: list[list[int]]


class Graphs:
    """One step's graphs over one set of parameters, cache and static batch; captured anew when these change. A step of
    which there can be none runs eagerly."""

    def __init__(self, step: Step, ops: Ops) -> None:
        self._step, self._ops, self._eager = step, ops, False
        self._bound: tuple[Any, ...] = ()
        self._made: dict[int, tuple[Any, Array, NpuMeta]] = {}
        self._pool: Any = None

    def __call__(self, params: Params, kv: Any, batch: Decode) -> Array:
        """Logits [seqs,V]; valid until the next call."""
        bound = params, kv, batch.static
        if not self._bound or any(a is not b for a, b in zip(self._bound, bound, strict=True)):
            self._bound, self._made, self._pool, self._eager = bound, {}, None, False
        size, groups = len(batch.kv_len[0]), len(batch.kv_len)
        if size not in self._made and not self._eager:
            try:
                self._made[size] = self._capture(params, kv, batch.static, size)
            except Eager:
                self._eager = True
        if self._eager:
            return self._step(self._ops, params, kv, batch.static.meta(batch))[0]
        graph, logits, _ = self._made[size]
        of = [layer.group for layer in kv] if groups > 1 else [0]  # attentions are in the order of layers
        torch.npu.current_stream().synchronize()
        graph.update(cpu_update_input=[{"actual_seq_kvlen": batch.kv_len[group]} for group in of])
        graph.replay()
        return logits[: batch.seqs]

    def _capture(self, params: Params, kv: Any, static: StaticBatch, size: int) -> tuple[Any, Array, NpuMeta]:
        """Raises Eager before anything is captured."""
        warm = static.captured(size)
        self._step(self._ops, params, kv, warm)  # compiles what is not yet; the replay writes the same rows
        meta = static.captured(size)  # lives as long as the graph, which reads its tensors
        torch.npu.synchronize()
        graph = torch.npu.NPUGraph()
        # other threads, which watch collectives, may use the device meanwhile
        mode = {"auto_dispatch_capture": True, "capture_error_mode": "thread_local"}
        with torch.npu.graph(graph, pool=self._pool, **mode):
            logits, _ = self._step(self._ops, params, kv, meta)
        self._pool = self._pool or graph.pool()
        return graph, logits, meta
