"""Continuous batching over a paged cache with shared prefixes. Knows no device: it makes plans, somebody runs them.

Plans are launched in the order in which they were made, and `apply` gets their samples in that order. `plan` may be
called while earlier plans are in flight: a token the host has not seen is named by its row in the plan launched last.
The ledger says who owns which page.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from polyradix.backend.batch import I32
from polyradix.schedule.config import SchedulerConfig as SchedulerConfig
from polyradix.schedule.estimate import Estimate
from polyradix.schedule.jump import begin, forced
from polyradix.schedule.ledger import Ledger
from polyradix.schedule.params import InvalidParam
from polyradix.schedule.plan import Finish, LogProbArrays, Output, Plan, RowTable, Slots, details, slots_of
from polyradix.schedule.queue import WaitingQueue
from polyradix.schedule.request import Request

SPREAD = 2  # steps of single rows, at most, in place of one with chunks


class Scheduler:
    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.blocked = False  # when last looked at, the queue stood still for want of rows or pages
        self.retracted = 0  # totals
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.jumped_tokens = 0
        self._table = RowTable(
            config.max_seqs, -(-config.max_context // config.page_size), config.page_size, config.groups
        )
        self._ledger = Ledger(config, self._table)
        self._known: dict[str, Request] = {}
        self._arrivals = 0
        self._queue = WaitingQueue(config.policy, config.fair)
        self._claim: Request | None = None  # first in the queue and not admitted: less important requests yield to it
        self._estimate = Estimate(config.conservativeness)
        self._prefilling: list[Request] = []  # admitted, with prompt tokens left to plan
        self._decoding: list[Request] = []
        self._slots: Slots = np.empty(0, np.intp)  # of _decoding; never written to, as plans keep it
        self._filling: list[Request] = []  # admitted, with a prefill not fully applied: others may wait for its prefix
        self._flight: deque[Plan] = deque()
        self._launched = 0

    def add(self, req: Request) -> None:
        """Queue a request. Raises InvalidParam if it is malformed or can never be served."""
        req.params.check()
        n, c, capacity = len(req.prompt), self.config, self._ledger.longest
        if req.rid in self._known:
            raise InvalidParam("rid", req.rid, "an id that is not in use")
        if n == 0:
            raise InvalidParam("prompt", [], "at least one token")
        if n >= c.max_context:
            raise InvalidParam("prompt", f"{n} tokens", f"at most {c.max_context - 1}: the context is {c.max_context}")
        if n > capacity:
            raise InvalidParam("prompt", f"{n} tokens", f"at most {capacity}: the KV cache has room for no more")
        # The last token's KV is never stored, so a lone request may outgrow the pool by one.
        req.limit = min(n + req.params.max_tokens, c.max_context, capacity + 1)
        self._arrivals += 1
        req.arrival = self._arrivals
        self._known[req.rid] = req
        self.jumped_tokens += begin(req)
        self._queue.add(req)

    def abort(self, rid: str) -> bool:
        """Drop a request; it gives no further Output. True if it was known."""
        req = self._known.pop(rid, None)
        if req is None:
            return False
        req.finished = True
        if req.slot < 0:
            self._queue.remove(req)
        else:
            self._leave(req)
        return True

    def plan(self) -> Plan | None:
        """The next step, already counted as launched. None when there is nothing to do now: if plans are in flight,
        apply them and ask again."""
        ready = self._ready() if self._make_way() else None
        if ready is None:
            return None
        rows, slots = ready
        chunks = self._chunks(self.config.max_tokens - len(rows))
        while not (rows or chunks or self._flight) and len(self._prefilling) > 1:  # their windows take all pages
            self._retract(max(self._prefilling, key=_yields))
            chunks = self._chunks(self.config.max_tokens)
        if not rows and not chunks:
            return None
        parts = self._parts(chunks, self.config.max_seqs - len(rows))
        if parts:
            rows = rows + [req for req, _ in parts]
            slots = np.concatenate((slots, slots_of(req for req, _ in parts)))
        plan = self._table.build(self._launched + 1, rows, slots, [n for _, n in parts], self._applied)
        self._launched += 1
        self._estimate.fade()
        self._flight.append(plan)
        if begun := [req for req, _ in chunks if self._left(req) == 0]:
            self._decoding += begun
            self._slots = np.concatenate((self._slots, slots_of(begun)))
            self._prefilling = [req for req in self._prefilling if self._left(req)]
        return plan

    def apply(self, plan: Plan, tokens: I32, logprobs: LogProbArrays | None = None) -> list[Output]:
        """Take the samples int32 [S] of the oldest plan in flight, and log-probabilities if it wants any."""
        if not self._flight or plan is not self._flight[0]:
            raise ValueError(f"plan {plan.number} applied; expected plan {self._applied + 1}, in launch order")
        wanted = plan.top_logprobs is not None and logprobs is None
        if wanted and any(req.params.logprobs is not None and not req.finished for req in plan.rows):
            raise ValueError(f"logprobs is None; expected {plan.top_logprobs} a row, as plan {plan.number} says")
        self._flight.popleft()
        out, special = list[Output](), list[Output]()
        columns = plan.rows, tokens.tolist(), plan.host.kv_len.tolist(), plan.plain.tolist()
        for row, (req, token, end, plain) in enumerate(zip(*columns, strict=True)):
            if req.finished:
                continue
            req.stored = end
            if plain and token not in req.stops:
                req.outputs.append(token)
                out.append(Output(req, [token]))
                continue
            if end < req.prefill:
                continue
            o = Output(req, [token], self._append(req, token, end + 1))
            out.append(o)
            special.append(o)
            if logprobs is not None and req.params.logprobs is not None:
                o.logprobs = details(row, req.params.logprobs, logprobs)
            if req.ahead:
                o.tokens, req.ahead = [*req.ahead, token], []
        self._table.token[plan.slots] = tokens  # where a slot is another request's by now, it is set again in time
        for req in [req for req in self._filling if req.stored >= req.prefill]:
            self._filling.remove(req)
            self._ledger.share(req, req.fed, self._launched)
        if self.config.groups.windowed:
            ends, size = plan.host.kv_len, self.config.page_size
            more = ends // size > (ends - np.diff(plan.host.cu_q)) // size  # whole blocks
            for req in {plan.rows[row]: None for row in more.nonzero()[0].tolist()}:
                if not req.finished:
                    self._ledger.passed(req, self._launched)
        for o in special:
            if o.finish is None and o.req.jumps:
                self._jump(o)
        if self.config.fair:
            ahead = [o.req.tenant for o in special for _ in o.tokens[1:]]
            self._queue.charge_outputs([o.req.tenant for o in out] + ahead)
        for o in special:
            if o.finish is not None:
                del self._known[o.req.rid]
                self._leave(o.req)
        self._ledger.drain(self._applied)
        return out

    def flush(self) -> None:
        """Forget all prefixes not in use."""
        self._ledger.pool.free(self._ledger.tree.flush())

    @property
    def capacity(self) -> int:
        """Tokens that can be lent pages for."""
        return self._ledger.capacity

    def lend(self, tokens: int) -> list[int] | None:
        """Pages for so many tokens of somebody else's, those of each block together in the order of groups; None if
        running requests would be short. Nothing in flight uses them."""
        return self._ledger.lend(tokens, self._reserve())

    def give_back(self, pages: list[int]) -> None:
        """Lent pages, when nothing in flight uses them."""
        self._ledger.give_back(pages)

    @property
    def has_work(self) -> bool:
        return bool(self._known or self._flight)

    @property
    def in_flight(self) -> int:
        return len(self._flight)

    @property
    def running(self) -> int:
        return len(self._prefilling) + len(self._decoding)

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def excess(self) -> int:
        """How many wait for longer than until the next plan, as far as can be told."""
        return len(self._queue) - (0 if self.blocked else self._table.available)

    def last_waiting(self) -> Request | None:
        """See WaitingQueue.last."""
        return self._queue.last()

    def overdue(self, now: float) -> list[Request]:
        """Requests whose deadline has passed."""
        return [req for req in self._known.values() if req.deadline <= now]

    @property
    def pages_used(self) -> int:
        """Held by running requests, shared prefixes included."""
        return self._ledger.used

    @property
    def pages_cached(self) -> int:
        """Held by the tree alone, there to be evicted."""
        return self._ledger.tree.evictable_pages

    def check(self) -> None:
        """Raises AssertionError unless every page is accounted for exactly once and every reference is real."""
        running = self._prefilling + self._decoding
        self._ledger.check(running, bool(self._flight))
        assert len(running) == self.config.max_seqs - self._table.available, "rows do not match"
        assert {req.rid for req in [*running, *self._queue]} == set(self._known), "a request is lost"

    @property
    def _applied(self) -> int:
        return self._launched - len(self._flight)

    def _left(self, req: Request) -> int:
        """Prefill tokens not planned yet."""
        return max(0, len(req.fed) - int(self._table.computed[req.slot]))

    def _ready(self) -> tuple[list[Request], Slots] | None:
        """The requests that decode in the next plan and their slots, each with a page for its token. None when pages
        ran out and only the plans in flight can tell what to do."""
        while True:
            rows, slots = list(self._decoding), self._slots
            can = self._table.may_grow(slots)
            if ending := (~can).nonzero()[0].tolist():
                slots = slots[can]
                for row in reversed(ending):
                    del rows[row]
            full = (self._table.computed[slots] % self.config.page_size == 0).nonzero()[0]
            if self._ledger.grow([rows[i] for i in full.tolist()], slots[full]):
                return rows, slots
            if self._flight:
                return None
            self._retract(max(self._prefilling + self._decoding, key=_yields))
            self._estimate.was_low()

    def _chunks(self, budget: int) -> list[tuple[Request, int]]:
        """Prefill for the next plan within a budget of tokens: what is begun first, then new requests."""
        out: list[tuple[Request, int]] = []
        budget = min(budget, self.config.chunk or budget)
        prefills = self._prefills()
        while budget and (req := next(prefills, None)) is not None:
            n = self._ledger.widen(req, min(budget, self._left(req)))
            if n == 0:
                break
            out.append((req, n))
            budget -= n
        return out

    def _parts(self, chunks: list[tuple[Request, int]], room: int) -> list[tuple[Request, int]]:
        """What of these chunks goes into the next plan, with `room` for more rows; see SchedulerConfig.single_rows."""
        if not self.config.single_rows or sum(n for _, n in chunks) > SPREAD * room:
            return chunks
        return [(req, 1) for req, n in chunks for _ in range(n)][:room]

    def _prefills(self) -> Iterator[Request]:
        """What is begun and, admitted when asked for, what waits: the most important first, begun before new."""
        begun = deque(sorted(self._prefilling, key=lambda req: req.rank[0]))
        self.blocked = bool(self._queue) and not self._table.available
        if self.config.policy != "priority":
            yield from begun
            begun.clear()
            if self.blocked:
                return
        for req in self._queue.order(self._cached):
            while begun and begun[0].rank[0] <= req.rank[0]:
                yield begun.popleft()
            if self._held_back(req):
                continue
            if not self._admit(req):
                self.blocked, self._claim = True, req
                break
            yield req
            if not self._table.available and self.config.policy != "priority":
                self.blocked = bool(self._queue)
                return
        yield from begun

    def _make_way(self) -> bool:
        """Retracts what must yield to the claim. False: plans in flight must be applied first."""
        req, self._claim = self._claim, None
        if req is None or req.finished or not (yielding := self._yielding(req)):
            return True
        if self._flight:
            self._claim = req
            return False
        for other in yielding:
            self._retract(other)
        return True

    def _yielding(self, req: Request) -> list[Request]:
        """The fewest running requests, all less important, without which a waiting one can be admitted; maybe none."""
        if self.config.policy != "priority":
            return []
        worse = [other for other in self._prefilling if other.rank[0] > req.rank[0]]
        less = self._table.importance[self._slots] > req.rank[0]
        worse += [self._decoding[row] for row in less.nonzero()[0].tolist()]
        if not worse:
            return []
        worse.sort(key=_yields, reverse=True)
        found = self._ledger.match(req)

        def fits(n: int) -> bool:
            return self._ledger.fits(req, found, worse[:n], self._reserve(worse[:n]))

        count = 1 + bisect_left(range(1, len(worse) + 1), True, key=fits)
        self._ledger.unmatch(found)
        return worse[:count] if count <= len(worse) else []

    def _cached(self, req: Request) -> int:
        """Tokens of a waiting request the tree has. May be too high where pages were evicted since: it is a hint."""
        tree = self._ledger.tree
        if req.hint[0] != tree.version:
            req.hint = (tree.version, tree.prefix(req.fed[:-1], req.namespace))
        return req.hint[1]

    def _held_back(self, req: Request) -> bool:
        """True while a prefill under way will soon put at least one more page of this request into the tree."""
        if not self.config.radix or not self._filling:
            return False
        end = self._cached(req) + self.config.page_size
        if end >= len(req.fed):
            return False
        head = req.raw[: end * req.fed.itemsize]
        return any(other.raw.startswith(head) and other.namespace == req.namespace for other in self._filling)

    def _admit(self, req: Request) -> bool:
        """Give a waiting request a slot, the cached prefix and pages for the rest. False, changing nothing, if there is
        no slot, or too few pages would be left for the outputs of all, or this one would soon be retracted again."""
        if not self._table.available:
            return False
        found = self._ledger.admit(req, self._reserve())
        if found is None:
            return False
        self._queue.remove(req)
        self._ledger.tree.hit(found.node)
        self._prefilling.append(req)
        self._filling.append(req)
        if not req.admitted:
            req.admitted, req.cached_tokens = True, min(found.length, len(req.prompt))
            req.queue_seconds = time.monotonic() - req.born
            self.prompt_tokens += len(req.prompt)
            self.cached_tokens += req.cached_tokens
            self._queue.charge(req, len(req.prompt) - found.length)
        return True

    def _reserve(self, without: Sequence[Request] = ()) -> int:
        """Pages for the outputs to come of what runs, but for some."""
        growth = self._table.growth()
        growth[slots_of(without)] = 0
        groups, size = self.config.groups, self.config.page_size
        pages = groups.full * self._estimate.pages(growth, size)
        if groups.windowed:  # a sequence as long as the window gives back a block for each that it takes
            near = np.maximum(groups.window - self._table.tokens(), 1)
            pages += groups.windowed * self._estimate.pages(np.minimum(growth, near), size)
        return pages

    def _append(self, req: Request, token: int, count: int) -> Finish | None:
        """Why it ends with this token, the `count`-th of prompt and outputs, if it does."""
        req.outputs.append(token)
        if token in req.stops or (req.matcher is not None and req.matcher.accept(token)):
            req.finished = True
            return "stop"
        req.finished = count >= req.limit
        return "length" if req.finished else None

    def _jump(self, out: Output) -> None:
        """Append what the grammar forces after the token just taken; one chunk of prefill will compute it. Not where
        that saves no step, as a step with the newest token may be in flight already, or where pages are short."""
        req = out.req
        known = len(req.prompt) + len(req.outputs)
        in_flight = int(self._table.computed[req.slot]) - known + 1
        tokens = forced(req, req.limit - known)
        req.jumped = bool(tokens)
        if in_flight > 1 or len(tokens) <= in_flight:
            return
        if not self._ledger.extend(req, known + len(tokens), self._reserve()):
            return
        for count, token in enumerate(tokens, known + 1):
            out.tokens.append(token)
            out.finish = self._append(req, token, count)
            if out.finish:
                break
        req.feed(req.tokens())
        self._stop_decoding(req)
        self._prefilling.insert(0, req)
        self.jumped_tokens += len(req.fed) - known

    def _leave(self, req: Request) -> None:
        """Take a request out of the running ones; what it computed goes to the tree."""
        self._stop_decoding(req)
        for group in (self._prefilling, self._filling):
            if req in group:
                group.remove(req)
        self._ledger.leave(req, self._launched)
        self._ledger.drain(self._applied)

    def _stop_decoding(self, req: Request) -> None:
        here = self._slots == req.slot
        for row in here.nonzero()[0].tolist():
            del self._decoding[row]
            self._slots = self._slots[~here]

    def _retract(self, req: Request) -> None:
        """Back to the front of the queue; its prefill will compute prompt and outputs again. Nothing is in flight."""
        self._leave(req)
        req.feed(req.tokens())
        self._queue.add(req)
        self.retracted += 1


def _yields(req: Request) -> tuple[int, int]:
    """The greatest yields first: the least important, and of these the newest."""
    return req.rank[0], req.arrival
