"""A device that stores tokens instead of KV, so that a test can read back what a page really holds.

The next token of a sequence is a hash of the request's seed, the position, and every token read through the page ids
of the plan. Any page that was freed, shared or overwritten too early, any wrong slot, position or from_prev changes it,
and is also reported on the spot.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polyradix.schedule.params import SamplingParams
from polyradix.schedule.plan import Output, Plan
from polyradix.schedule.request import Request
from polyradix.schedule.scheduler import Scheduler, SchedulerConfig

VOCAB = 64


def next_token(seed: int, tokens: np.ndarray) -> int:
    """The token after `tokens` int32 [n]: a pure function of the seed and the sequence, length included."""
    return zlib.crc32(np.asarray(tokens, "<i4").tobytes(), zlib.crc32(str((seed, len(tokens))).encode())) % VOCAB


class Forcing:
    """A grammar that forces runs of tokens, and ends, by a hash of the seed and all tokens before. Between the runs it
    allows everything."""

    def __init__(self, seed: int, taken: Sequence[int] = ()) -> None:
        self.seed, self.taken = seed, list[int]()
        self.run = self._roll()
        for token in taken:
            self.accept(token)

    def _hash(self) -> int:
        return zlib.crc32(str((self.seed, self.taken)).encode())

    def _roll(self) -> list[int]:
        h = self._hash()
        return [(h >> i) % VOCAB for i in range(h % 8)] if h % 3 == 0 else []

    def fill(self, row: np.ndarray) -> None:
        raise NotImplementedError

    def accept(self, token: int) -> bool:
        assert not self.run or token == self.run.pop(0), "not the token that is forced"
        self.taken.append(token)
        self.run = self.run or self._roll()
        return self._hash() % 19 == 0

    def forced(self) -> list[int]:
        return list(self.run)


def choose(req: Request, tokens: np.ndarray) -> int:
    """The token after `tokens`, prompt and outputs so far: what the grammar forces, or else next_token."""
    forced = Forcing(req.seed, tokens[len(req.prompt) :].tolist()).forced() if req.matcher is not None else []
    return forced[0] if forced else next_token(req.seed, tokens)


def expected(req: Request, limit: int) -> tuple[list[int], str]:
    """What a request must produce, and why it must end. `limit`: prompt and outputs together end here."""
    tokens, n = list(req.prompt), len(req.prompt)
    grammar = None if req.matcher is None else Forcing(req.seed)
    while True:
        tokens.append(choose(req, np.array(tokens, np.int32)))
        if tokens[-1] in req.stops:
            return tokens[n:], "stop"
        if grammar is not None and grammar.accept(tokens[-1]):
            return tokens[n:], "stop"
        if len(tokens) >= min(limit, n + req.params.max_tokens):
            return tokens[n:], "length"


@dataclass
class Flight:
    plan: Plan
    samples: np.ndarray


class FakeDevice:
    """Runs plans in launch order. `truth` has every request ever added, by id: rows are compared with it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.token = np.full(config.pages * config.page_size, -1, np.int64)
        self.position = np.full(config.pages * config.page_size, -1, np.int64)
        self.space = np.full(config.pages * config.page_size, "?", object)
        self.truth: dict[str, np.ndarray] = {}  # the full sequence
        self.flights: list[Flight] = []
        self.last: Flight | None = None
        self.outputs: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.out: dict[str, Output] = {}  # the newest of each
        self.computed = 0  # tokens

    @property
    def limit(self) -> int:
        longest = self.config.groups.tokens(self.config.pages - 1, self.config.page_size)
        return min(self.config.max_context, longest + 1)

    def add(
        self,
        rid: str,
        prompt: list[int],
        max_tokens: int = 4,
        seed: int = 0,
        namespace: str = "",
        priority: int = 0,
        tenant: str = "",
        forcing: bool = False,
        jumps: bool = False,
        **params: object,
    ) -> Request:
        req = Request(
            rid,
            np.array(prompt, np.int32),
            SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
            namespace=namespace,
            seed=seed,
            priority=priority,
            tenant=tenant,
        )
        if forcing:
            req.matcher, req.jumps = Forcing(seed), jumps
        self.scheduler.add(req)
        self.truth[rid] = np.array(prompt + expected(req, self.limit)[0], np.int32)
        self.outputs[rid] = []
        return req

    def launch(self) -> Plan | None:
        plan = self.scheduler.plan()
        if plan is not None:
            self._check_shape(plan)
            self._check_apart(plan)
            self.last = Flight(plan, self._run(plan))
            self.flights.append(self.last)
        return plan

    def apply(self) -> list[Output]:
        flight = self.flights.pop(0)
        outputs = self.scheduler.apply(flight.plan, flight.samples, self._logprobs(flight))
        for out in outputs:
            rid = out.req.rid
            assert rid not in self.finish, "an output after the last one"
            self.outputs[rid] += out.tokens
            self.out[rid] = out
            if out.finish is not None:
                self.finish[rid] = out.finish
        return outputs

    def step(self) -> Plan | None:
        """Launch and apply with nothing else in flight."""
        plan = self.launch()
        if plan is not None:
            self.apply()
        self.scheduler.check()
        return plan

    def drain(self, depth: int = 1) -> None:
        """Run until there is no work, `depth` plans in flight."""
        idle = 0
        while self.scheduler.has_work:
            plan = self.launch()
            idle = idle + 1 if plan is None and not self.flights else 0
            assert idle == 0, "there is work, nothing is in flight, and no plan comes"
            if self.flights and (plan is None or len(self.flights) >= depth):
                self.apply()
            self.scheduler.check()

    def verify(self, req: Request) -> None:
        """The request is finished and got exactly what it must get."""
        tokens, finish = expected(req, self.limit)
        assert self.outputs[req.rid] == tokens
        assert self.finish[req.rid] == finish
        out = self.out[req.rid]
        assert out.stop_token == (tokens[-1] if tokens[-1] in req.stops else None)
        if req.jumps and req.cached_tokens == len(req.prompt):
            return  # what is forced from the start was computed instead of the last of the prompt
        assert 0 <= req.cached_tokens < len(req.prompt)
        assert req.cached_tokens % self.config.page_size == 0

    def _check_shape(self, plan: Plan) -> None:
        h, s, n = plan.host, plan.sample, len(plan.rows)
        rows, size = h.num_tokens, self.config.page_size
        shapes = {"tokens": rows, "positions": rows, "slots": rows, "from_prev": rows, "cu_q": n + 1, "kv_len": n}
        for name, length in (shapes | {"last": n}).items():
            array = getattr(h, name)
            assert array.dtype == np.int32, name
            assert array.shape == (length,), name
        assert len(h.others) == self.config.groups.count - 1
        for table in h.by_group:
            assert table.pages.dtype == table.slots.dtype == np.int32
            assert table.pages.flags.c_contiguous
            assert table.pages.shape == (n, max(-(-k // size) for k in h.kv_len))
            assert table.slots.shape == (rows,)
        assert 0 < n <= self.config.max_seqs
        assert n <= rows <= self.config.max_tokens
        assert len({req.rid for req in plan.rows}) == n or (self.config.single_rows and rows == n)
        assert h.cu_q[0] == 0
        assert h.cu_q[-1] == rows
        assert (np.diff(h.cu_q) > 0).all()
        assert (h.last == h.cu_q[1:] - 1).all()
        assert (s.position == h.kv_len).all()
        assert (h.kv_len < self.config.max_context).all()
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "position"):
            assert getattr(s, name).shape == (n,)
        assert s.seed.tolist() == [req.seed for req in plan.rows]
        assert s.temperature.tolist() == [np.float32(req.params.temperature) for req in plan.rows]
        slots = np.concatenate([table.slots for table in h.by_group])
        assert len(set(slots.tolist())) == rows * len(h.by_group), "two rows write one slot"
        assert (slots >= size).all(), "a row writes the scratch page"
        wants = [req.params.logprobs for req in plan.rows if req.params.logprobs is not None]
        assert plan.top_logprobs == max(wants, default=None)

    def _seen(self, plan: Plan, s: int) -> list[tuple[np.ndarray, int]]:
        """Of each group the pages of a row, and the first block that is read."""
        h, groups = plan.host, self.config.groups
        start = int(h.kv_len[s] - (h.cu_q[s + 1] - h.cu_q[s]))
        first = max(0, start - groups.window + 1) // self.config.page_size  # of the keys that the first new token sees
        firsts = [0] * groups.full + [first] * groups.windowed
        return [(table.pages[s], first) for table, first in zip(h.by_group, firsts, strict=True)]

    def _check_apart(self, plan: Plan) -> None:
        """No page is written that a plan still in flight uses for another request, or that this one reads for one."""
        size, plans = self.config.page_size, [*(f.plan for f in self.flights), plan]
        used = [
            (owner, {page for pages, first in self._seen(other, t) for page in pages[first:].tolist()} - {0})
            for other in plans
            for t, owner in enumerate(other.rows)
        ]
        for s, req in enumerate(plan.rows):
            begin, end = plan.host.cu_q[s : s + 2]
            written = {slot // size for table in plan.host.by_group for slot in table.slots[begin:end].tolist()}
            for owner, pages in used:
                assert owner is req or not written & pages, f"{req.rid} writes pages that {owner.rid} uses"

    def _run(self, plan: Plan) -> np.ndarray:
        h, size = plan.host, self.config.page_size
        for s, req in enumerate(plan.rows):
            for t in range(h.cu_q[s], h.cu_q[s + 1]):
                position = int(h.positions[t])
                assert position == h.kv_len[s] - (h.cu_q[s + 1] - t), "positions are not the newest of the sequence"
                for table in h.by_group:
                    slot = int(table.slots[t])
                    assert slot == table.pages[s, position // size] * size + position % size, "a slot outside its page"
                    self.token[slot], self.position[slot] = self._token(h.from_prev[t], h.tokens[t]), position
                    self.space[slot] = req.namespace
        self.computed += h.num_tokens
        return np.array([self._sample(plan, s) for s in range(len(plan.rows))], np.int32)

    def _token(self, from_prev: int, token: int) -> int:
        if from_prev < 0:
            return int(token)
        assert self.last is not None
        assert self.flights, "from_prev names a plan that was applied"
        return int(self.last.samples[from_prev])

    def _sample(self, plan: Plan, s: int) -> int:
        """Read the sequence through each group's page ids, a windowed one from its window on, compare it with the
        truth, and hash it."""
        req, n, size = plan.rows[s], int(plan.host.kv_len[s]), self.config.page_size
        used, seen = -(-n // size), self._seen(plan, s)
        every = [page for pages, first in seen for page in pages[first:used].tolist()]
        assert len(set(every)) == len(every)
        assert 0 not in every
        truth = self.truth[req.rid]
        own = min(n, len(truth))  # a late row of a finished request goes one beyond the truth
        assert n <= len(truth) + len(self.flights)
        assert plan.sample.seed[s] == req.seed
        for pages, first in seen:
            assert (pages[used:] == 0).all(), "page ids beyond the sequence are not 0"
            begin = first * size
            slots = (pages[first:used, None] * size + np.arange(size)).ravel()[: n - begin]
            assert (self.position[slots] == np.arange(begin, n)).all(), f"{req.rid} reads others' positions"
            assert (self.space[slots] == req.namespace).all(), f"{req.rid} reads another namespace"
            assert (self.token[slots][: own - begin] == truth[begin:own]).all(), f"{req.rid} reads others' tokens"
        slots = (seen[0][0][:used, None] * size + np.arange(size)).ravel()[:n]
        return choose(req, self.token[slots])

    def _logprobs(self, flight: Flight) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Log-probabilities that name what they belong to: chosen = -token, ids = token + k, values = -k."""
        if (top := flight.plan.top_logprobs) is None:
            return None
        ks = np.arange(top, dtype=np.int32)
        ids = flight.samples[:, None] + ks
        return -flight.samples.astype(np.float32), ids, np.broadcast_to(-ks, ids.shape).astype(np.float32)
