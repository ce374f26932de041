"""One step, what comes out of it, and the table its arrays are gathered from in bulk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from polyradix.backend.batch import F32, I32, HostBatch, SampleBatch, Table
from polyradix.cache.blocks import Groups
from polyradix.grammar.spec import Matcher
from polyradix.schedule.request import Request

Slots: TypeAlias = NDArray[np.intp]  # the type that indexes an array fastest
Finish: TypeAlias = Literal["stop", "length"]
TokenLogProbs: TypeAlias = tuple[float, list[tuple[int, float]]]  # of the token; the best (id, logprob), descending
LogProbArrays: TypeAlias = tuple[F32, I32, F32]  # chosen [S], ids [S,K], values [S,K]


@dataclass(frozen=True)
class Plan:
    """One step of S rows: decode rows first, in the order in which requests began to decode, then prefill chunks.
    Chunks of one request follow each other.

    Every row is sampled; the sample of a chunk that is not a prefill's last means nothing and `apply` skips it.
    """

    number: int  # counts launches from 1
    rows: list[Request]  # S
    slots: Slots  # [S], that the rows had when it was made
    host: HostBatch
    sample: SampleBatch
    plain: NDArray[np.bool_]  # [S] whose sample, unless it is a stop token, is appended and nothing more
    top_logprobs: int | None  # the most alternatives a row wants, None if no row wants logprobs
    masked: bool = False  # a row has a grammar, or penalties and such: sampling needs all earlier plans applied

    def sampling(self) -> list[tuple[int, Request]]:
        """The rows whose sample will count. All earlier plans are applied."""
        ends = self.host.kv_len.tolist()
        return [(row, r) for row, r in enumerate(self.rows) if not r.finished and ends[row] >= len(r.fed)]

    def choosing(self) -> list[tuple[int, Request, Matcher]]:
        """Of these, the rows that sample by a grammar, with theirs."""
        return [(row, req, req.matcher) for row, req in self.sampling() if req.matcher is not None]


class Output(msgspec.Struct, gc=False):
    """What one step gave one request: `tokens` with what was forced ahead of them, a stop token as the last."""

    req: Request
    tokens: list[int]
    finish: Finish | None = None
    logprobs: list[TokenLogProbs] | None = None

    @property
    def stop_token(self) -> int | None:
        return self.tokens[-1] if self.finish == "stop" and self.tokens[-1] in self.req.stops else None


def details(row: int, n: int, logprobs: LogProbArrays) -> list[TokenLogProbs]:
    """Of the token of this row, with n alternatives."""
    chosen, ids, values = logprobs
    return [(float(chosen[row]), list(zip(ids[row, :n].tolist(), values[row, :n].tolist(), strict=True)))]


def slots_of(requests: Iterable[Request]) -> Slots:
    return np.array([req.slot for req in requests], np.intp)


class RowTable:
    """State of up to `rows` running requests, one row each, as arrays: `slot` below is an index into them."""

    def __init__(self, rows: int, width: int, page_size: int, groups: Groups) -> None:
        self.rows = rows
        self.page_size = page_size
        self.groups = groups
        self.pages = np.zeros((groups.count, rows, width), np.int32)  # the full groups first
        self.tables = list(self.pages)  # of each group, the same memory
        self.computed = np.zeros(rows, np.int32)  # tokens whose KV is computed by the plans made so far
        self.limit = np.zeros(rows, np.int32)
        self.fed = np.zeros(rows, np.int32)  # tokens to prefill
        self.token = np.zeros(rows, np.int32)  # the newest token the host knows
        self.source_plan = np.zeros(rows, np.int64)  # the newest plan with this slot, and its row there
        self.source_row = np.zeros(rows, np.int32)
        self.temperature = np.zeros(rows, np.float32)
        self.top_k = np.zeros(rows, np.int32)
        self.top_p = np.zeros(rows, np.float32)
        self.min_p = np.zeros(rows, np.float32)
        self.seed = np.zeros(rows, np.int32)
        self.logprobs = np.zeros(rows, np.int32)  # -1: none wanted
        self.masked = np.zeros(rows, np.bool_)  # as in Plan
        self.importance = np.zeros(rows, np.int64)  # Request.rank[0]
        self.plain = np.zeros(rows, np.bool_)  # wants no logprobs and is not masked
        self._free = list(range(rows - 1, -1, -1))

    @property
    def available(self) -> int:
        return len(self._free)

    def assign(self, req: Request) -> None:
        """Give the request a slot: its pages, `stored` tokens of them computed, and how to sample."""
        slot = req.slot = self._free.pop()
        p = req.params
        self.set_pages(req)
        if req.window:
            each = np.array([block.pages for block in req.window], np.int32)
            self.pages[self.groups.full :, slot, req.gone : req.gone + len(each)] = each.T
        self.computed[slot] = req.stored
        self.limit[slot] = req.limit
        self.fed[slot] = len(req.fed)
        self.temperature[slot], self.top_p[slot], self.min_p[slot] = p.temperature, p.top_p, p.min_p
        self.top_k[slot] = max(p.top_k, 0)
        self.seed[slot] = (req.seed + 2**31) % 2**32 - 2**31
        self.masked[slot] = req.matcher is not None or p.adjusting != ""
        self.logprobs[slot] = -1 if p.logprobs is None else p.logprobs
        self.importance[slot] = req.rank[0]
        self.plain[slot] = p.logprobs is None and not self.masked[slot]

    def set_pages(self, req: Request) -> None:
        full = self.groups.full
        for group, table in enumerate(self.tables[:full]):
            table[req.slot, : len(req.pages) // full] = req.pages[group::full]

    def release(self, req: Request) -> None:
        self.pages[:, req.slot] = 0
        self.computed[req.slot] = self.limit[req.slot] = self.fed[req.slot] = 0
        self._free.append(req.slot)
        req.slot = -1

    def growth(self) -> I32:
        """The most tokens each row's request may still store beyond what its prefill does; 0 for free rows."""
        most: I32 = self.limit - self.tokens()
        return most

    def tokens(self) -> I32:
        """Of each row's request, once its prefill is done."""
        count: I32 = np.maximum(self.computed, self.fed)
        return count

    def may_grow(self, slots: Slots) -> NDArray[np.bool_]:
        """Which of these slots can take one more token and sample after it."""
        can: NDArray[np.bool_] = self.computed[slots] + 1 < self.limit[slots]
        return can

    def build(self, number: int, rows: list[Request], slots: Slots, chunks: list[int], applied: int) -> Plan:
        """The plan of rows with these slots, the last len(chunks) of them prefill with that many tokens. Advances the
        table past it. `applied`: the newest plan whose samples the host has. Every request that decodes is in every
        plan until it ends, so a token unknown to the host is a sample of the plan before this one."""
        start = self.computed[slots]
        for row, count in enumerate(chunks[:-1], len(slots) - len(chunks)):
            if rows[row + 1] is rows[row]:
                start[row + 1] = start[row] + count
        host = self._host(rows, slots, start, chunks, applied)
        self.computed[slots] = host.kv_len
        self.source_plan[slots] = number
        self.source_row[slots] = np.arange(len(slots), dtype=np.int32)
        sample = SampleBatch(
            temperature=self.temperature[slots],
            top_k=self.top_k[slots],
            top_p=self.top_p[slots],
            min_p=self.min_p[slots],
            seed=self.seed[slots],
            position=host.kv_len,
        )
        plain, top, masked = self.plain[slots], -1, False
        if not plain.all():
            top, masked = int(self.logprobs[slots].max()), bool(self.masked[slots].any())
        plain &= host.kv_len + 1 < self.limit[slots]
        plain[len(slots) - len(chunks) :] = False
        return Plan(number, rows, slots, host, sample, plain, top if top >= 0 else None, masked)

    def _host(self, rows: list[Request], slots: Slots, start: I32, chunks: list[int], applied: int) -> HostBatch:
        size, n = self.page_size, len(slots)
        decodes = slots[: n - len(chunks)]
        index = np.arange(n + 1, dtype=np.int32)
        tokens, positions, row_of, cu_q, kv_len = self.token[decodes], start, index[:n], index, start + np.int32(1)
        if chunks:
            counts = np.ones(n, np.int32)
            counts[len(decodes) :] = chunks
            cu_q = np.zeros(n + 1, np.int32)
            counts.cumsum(out=cu_q[1:])
            row_of = index[:n].repeat(counts)
            positions = np.arange(cu_q[-1], dtype=np.int32) + (start - cu_q[:-1])[row_of]
            kv_len = start + counts
            first = start[len(decodes) :].tolist()
            parts = [req.fed[a : a + c] for req, a, c in zip(rows[len(decodes) :], first, chunks, strict=True)]
            tokens = np.concatenate([tokens, *parts])
        used = (kv_len + np.int32(size - 1)) // size
        width = int(used.max())
        pages = [table[:, :width].take(slots, axis=0) for table in self.tables]
        for s in range(len(decodes), n):
            for table in pages:
                table[s, used[s] :] = 0  # a chunk's request already has the pages of its whole prompt
        from_prev = np.full(len(tokens), -1, np.int32)
        unknown = self.source_plan[decodes] > applied
        from_prev[: len(decodes)] = np.where(unknown, self.source_row[decodes], -1)
        page, offset = np.divmod(positions, np.int32(size))
        first, *others = [Table(table[row_of, page] * np.int32(size) + offset, table) for table in pages]
        return HostBatch(
            tokens=tokens,
            positions=positions,
            slots=first.slots,
            cu_q=cu_q,
            kv_len=kv_len,
            pages=first.pages,
            last=cu_q[1:] - np.int32(1),
            from_prev=from_prev,
            others=tuple(others),
        )
