"""Decode steps captured as device graphs, one per size: a replay costs one launch whatever the model's depth. Batches
whose sequences share first keys have graphs of their own.

A graph reads one static batch, which `load` fills by a copy on the same stream, so that two batches may be in flight.
Rows beyond the sequences of a batch decode position 0 of scratch page 0.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from polyradix.backend.batch import HostBatch
from polyradix.backend.protocol import Array, Limits, Ops, Params, Step
from polyradix_torch.triton import prefix
from polyradix_torch.triton.attention import Paged
from polyradix_torch.triton.forked import Forked
from polyradix_torch.triton.latent import Rows
from polyradix_torch.triton.ops import GpuMeta
from polyradix_torch.triton.upload import flat_pages, pinned

FIELDS = ("tokens", "positions", "slots", "from_prev", "kv_len", "page_start")


def sizes(most: int) -> list[int]:
    """Numbers of sequences that graphs are made for: 1, 2, 4, then every 8 up to `most`."""
    return sorted({*(n for n in (1, 2, 4) if n <= most), *range(8, most, 8), most})


def splits_for(programs: int, processors: int) -> int:
    """Parts to cut keys into, so that `programs` (sequences x kv heads) of a decode become two for every processor."""
    return max(1, min(32, 2 * processors // programs))


class StaticBatch:
    """The buffer that every graph reads: FIELDS of limits.max_seqs rows each, slots and page_start of the groups after
    the first, then the pages of `page` tokens of all groups. `share`: first keys that sequences have in common may be
    read once."""

    def __init__(
        self, limits: Limits, page: int, device: torch.device, latent: bool = False, share: bool = True,
        groups: int = 1,
    ) -> None:  # fmt: skip
        self.most, self.page, self.device, self.kind = limits.max_seqs, page, device, (latent, share)
        self.context, self.groups = limits.max_context, groups
        most, room = self.most, groups * self.most * -(-limits.max_context // page) + 1
        self.lines = len(FIELDS) + 2 * (groups - 1)
        self.buffer = torch.zeros(self.lines * most + room, dtype=torch.int32, device=device)
        lines = self.buffer[: self.lines * most].view(self.lines, most)
        self.fields = dict(zip(FIELDS, lines, strict=False))
        self.others = lines[len(FIELDS) :].view(groups - 1, 2, most)
        self.rows = torch.arange(most + 1, dtype=torch.int32, device=device)
        self.sizes = sizes(most)
        self.shared = False  # whether the batch in here has keys to share, by the plan in here
        self.plan = torch.zeros(groups, 3 * most + 5 * prefix.most_items(most), dtype=torch.int32, device=device)

    def load(self, batch: HostBatch) -> None:
        """One copy, two with a plan. Padding rows have one key, on page 0, which ends the list of pages."""
        n, tables = batch.num_seqs, batch.by_group
        pages, (starts, *_) = zip(*(flat_pages(table, self.page) for table in tables), strict=True)
        given = [batch.tokens, batch.positions, batch.slots, batch.from_prev, batch.kv_len, starts]
        for i, table in enumerate(tables[1:], 1):
            given += [table.slots, starts + np.int32(i * len(pages[0]))]
        rows = np.zeros((self.lines, self.most), np.int32)
        rows[3], rows[4], rows[5::2] = -1, 1, len(tables) * len(pages[0])
        for row, values in zip(rows, given, strict=True):
            row[:n] = values
        host = pinned([rows, *pages, np.zeros(1, np.int32)], self.device)
        self.buffer[: len(host)].copy_(host, non_blocking=True)
        single = np.arange(n, dtype=np.int32)
        latent, share = self.kind
        plans = [prefix.plan(table, single, self.page, self.most, latent) if share else None for table in tables]
        self.shared = any(plan is not None for plan in plans)
        if self.shared:
            none = np.zeros(self.plan.shape[1], np.int32)
            each = [none if plan is None else plan for plan in plans]
            self.plan.view(-1).copy_(pinned(each, self.device), non_blocking=True)

    def meta(self, count: int, splits: int, shared: bool = False) -> GpuMeta:
        """The first `count` rows as a batch, with its plans or without."""
        f = {name: x[:count] for name, x in self.fields.items()}
        rows, pages = self.rows[:count], self.buffer[self.lines * self.most :]
        none, last = rows[:0], rows.long()
        plans = [prefix.view(plan, self.most, count) if shared else None for plan in self.plan]
        metas = []
        for plan, (slots, start) in zip(plans, [(f["slots"], f["page_start"]), *self.others[..., :count]], strict=True):
            paged = Paged(self.rows[: count + 1], f["kv_len"], start, pages, rows, splits, none.view(0, 2), plan)
            which = Rows(rows, none.view(0, 3), none, none)
            metas.append(GpuMeta(f["tokens"], f["positions"], slots, last, paged, which, self.context))
        return replace(metas[0], others=tuple(metas[1:]))


@cache
def _side(device: torch.device) -> Any:
    """What comes to it goes first, as it is little."""
    return torch.cuda.Stream(device, priority=-1)


class Graphs:
    """One step's graphs over one set of parameters, cache and static batch; captured anew when these change."""

    def __init__(self, step: Step, ops: Ops, processors: int, fork: bool = False) -> None:
        """`fork`: some of it may run on a second stream, see Forked."""
        self._step, self._ops, self._processors, self._fork = step, ops, processors, fork
        self._bound: tuple[Any, ...] = ()
        self._made: dict[tuple[int, bool], tuple[Any, Array, GpuMeta]] = {}
        self._pool: Any = None

    def __call__(self, params: Params, kv: Any, static: StaticBatch, seqs: int) -> Array:
        """Logits [seqs,V] of the batch that `static` holds; valid until the next call."""
        bound = params, kv, static
        if not self._bound or any(a is not b for a, b in zip(self._bound, bound, strict=True)):
            self._bound, self._made, self._pool = bound, {}, None
        size = next(n for n in static.sizes if n >= seqs)
        first = not self._made and size >= prefix.LEAST_MEMBERS  # of all: both are made, so that kernels are compiled
        for shared in {static.shared, static.shared or (first and static.kind[1])}:
            if (size, shared) not in self._made:
                self._made[size, shared] = self._capture(params, kv, static, size, shared)
        graph, logits, _ = self._made[size, static.shared]
        graph.replay()
        return logits[:seqs]

    def _capture(
        self, params: Params, kv: Any, static: StaticBatch, size: int, shared: bool
    ) -> tuple[Any, Array, GpuMeta]:
        splits = splits_for(size * kv[0][0].shape[2], self._processors)
        if shared and not static.shared:
            static.plan.zero_()  # it is of another batch
        meta = static.meta(size, splits, shared)  # lives as long as the graph, which reads its tensors
        ops = Forked(self._ops, _side(static.device)) if self._fork else self._ops
        self._step(ops, params, kv, meta)  # compiles what is not yet; writes what the replay writes again
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: a thread of NCCL's looks at events of its own meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits, _ = self._step(ops, params, kv, meta)
        self._pool = self._pool or graph.pool()
        return graph, logits, meta
