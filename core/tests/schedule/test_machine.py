"""Random traffic against the scheduler, every page read back at every step."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from token_device import VOCAB, FakeDevice

from polyradix.cache.blocks import Groups
from polyradix.schedule.request import Request
from polyradix.schedule.scheduler import SchedulerConfig

WINDOWS = [Groups(1, 1, 5), Groups(1, 2, 9), Groups(2, 3, 2), Groups(1, 1, 16)]
STEMS = [[1] * 40, [1] * 9 + [2] * 31, [1] * 9 + [2] * 10 + [3] * 21]  # share 9 and 19 tokens


class Traffic(RuleBasedStateMachine):
    groups = st.just(Groups())

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, Request] = {}
        self.aborted: set[str] = set()

    @initialize(
        page_size=st.integers(1, 5),
        pages=st.integers(3, 30),
        max_seqs=st.integers(1, 6),
        spare=st.integers(0, 12),
        max_context=st.integers(8, 60),
        depth=st.integers(1, 3),
        policy=st.sampled_from(["lpm", "fcfs", "priority", "priority"]),
        radix=st.booleans(),
        eviction=st.sampled_from(["lru", "lfu", "slru", "priority"]),
        fair=st.booleans(),
        chunk=st.sampled_from([None, None, 1, 7]),
        conservativeness=st.sampled_from([0.0, 1.0, 50.0]),
        single_rows=st.booleans(),
        data=st.data(),
    )
    def start(self, page_size, pages, max_seqs, spare, max_context, depth, data, **options) -> None:
        self.depth = depth
        options["groups"] = groups = data.draw(self.groups)
        pages = 1 + (pages - 1) * groups.count if pages % 2 else max(pages, 1 + groups.count)
        self.device = FakeDevice(SchedulerConfig(page_size, pages, max_seqs + spare, max_seqs, max_context, **options))

    @rule(
        stem=st.sampled_from(STEMS),
        length=st.integers(0, 40),
        tail=st.lists(st.integers(0, VOCAB - 1), max_size=3),
        max_tokens=st.integers(1, 20),
        seed=st.integers(0, 2),
        namespace=st.sampled_from(["", "", "b"]),
        stops=st.lists(st.integers(0, VOCAB - 1), max_size=3),
        logprobs=st.sampled_from([None, None, 0, 2]),
        priority=st.integers(-1, 2),
        tenant=st.sampled_from(["", "x", "y"]),
        forcing=st.booleans(),
    )
    def add(
        self, stem, length, tail, max_tokens, seed, namespace, stops, logprobs, forcing, priority=0, tenant=""
    ) -> None:
        room = min(self.device.limit - 1, self.device.config.max_context - 1)
        prompt = ((stem[:length] + tail) or [5])[:room]
        rid = str(len(self.requests))
        self.requests[rid] = self.device.add(
            rid,
            prompt,
            max_tokens,
            seed,
            namespace,
            priority,
            tenant,
            forcing,
            logprobs is None,
            stop_token_ids=tuple(stops),
            logprobs=logprobs,
        )

    @rule(pick=st.integers(0, 9))
    def follow_up(self, pick: int) -> None:
        """The second turn of a chat: an earlier request's prompt and outputs, and something more."""
        rids = [rid for rid in self.device.finish if rid not in self.aborted]
        if rids:
            old = self.requests[rids[pick % len(rids)]]
            self.add([*old.prompt.tolist(), *old.outputs, 7, 8], 99, [], 3, old.seed, old.namespace, [], None, False)

    @precondition(lambda self: len(self.device.flights) < self.depth)
    @rule()
    def launch(self) -> None:
        plan = self.device.launch()
        if plan is None and not self.device.flights:
            assert not self.device.scheduler.has_work, "work, nothing in flight, and no plan"

    @precondition(lambda self: self.device.flights)
    @rule()
    def apply(self) -> None:
        self.device.apply()

    @rule(pick=st.integers(0, 9))
    def abort(self, pick: int) -> None:
        live = [rid for rid in self.requests if rid not in self.device.finish and rid not in self.aborted]
        if live:
            rid = live[pick % len(live)]
            assert self.device.scheduler.abort(rid)
            assert not self.device.scheduler.abort(rid)
            self.aborted.add(rid)

    @rule()
    def flush(self) -> None:
        self.device.scheduler.flush()
        assert self.device.scheduler.pages_cached == 0

    @rule(steps=st.integers(1, 15))
    def run(self, steps: int) -> None:
        """Many steps at once, or no request would ever get far."""
        for _ in range(steps):
            plan = self.device.launch() if len(self.device.flights) < self.depth else None
            if self.device.flights and (plan is None or len(self.device.flights) >= self.depth):
                self.device.apply()
            self.consistent()

    @invariant()
    def consistent(self) -> None:
        if not hasattr(self, "device"):
            return
        s = self.device.scheduler
        s.check()
        assert s.pages_used + s.pages_cached <= self.device.config.pages - 1
        assert s.running <= self.device.config.max_seqs
        for rid in self.aborted:
            assert rid not in self.device.finish
        if not self.device.flights and s.in_flight == 0 and not s.has_work:
            assert s.pages_used == 0, "a request that is gone still holds pages"

    def teardown(self) -> None:
        if not hasattr(self, "device"):
            return
        self.device.drain(self.depth)
        s = self.device.scheduler
        for rid, req in self.requests.items():
            if rid not in self.aborted:
                self.device.verify(req)
        assert (s.running, s.waiting, s.in_flight, s.pages_used) == (0, 0, 0, 0)
        s.flush()
        assert (s.pages_cached, s.pages_used) == (0, 0)


class WindowedTraffic(Traffic):
    groups = st.sampled_from(WINDOWS)


TestTraffic, TestWindowedTraffic = Traffic.TestCase, WindowedTraffic.TestCase
TestTraffic.settings = TestWindowedTraffic.settings = settings(max_examples=60, stateful_step_count=40)
