"""Random traffic against the engine on a backend that computes nothing: every request ends once, and for a reason."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from polyradix.engine import limits
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.messages import Chunk
from polyradix.schedule.params import SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "torch_dtype": "float32",
}


class Traffic(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.patch = mock.patch.object(limits, "monotonic", self.clock)
        self.patch.start()
        self.want: dict[str, int] = {}  # tokens asked for
        self.due: dict[str, float] = {}
        self.got: dict[str, int] = {}
        self.ended: dict[str, str] = {}

    def clock(self) -> float:
        return self.now

    @initialize(
        policy=st.sampled_from(["fcfs", "lpm", "priority"]),
        fair=st.booleans(),
        max_seqs=st.integers(1, 3),
        kv_pages=st.integers(5, 30),
        max_queued_requests=st.sampled_from([None, 0, 1, 3]),
        request_timeout=st.sampled_from([None, 5.0]),
        chunked_prefill_size=st.sampled_from([None, 3]),
        overlapped=st.booleans(),
    )
    def start(self, overlapped: bool, **options: Any) -> None:
        self.queued, self.timeout = options["max_queued_requests"], options["request_timeout"]
        self.priority = options["policy"] == "priority"
        base: dict[str, Any] = {"device": "null", "load_format": "dummy", "progress": False}
        base |= {"page_size": 4, "max_tokens_per_step": 16, "backend_options": {"async_launch": overlapped}}
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
            self.core = EngineCore(EngineConfig(model=folder, **base, **options))

    @rule(
        length=st.integers(1, 14),
        want=st.integers(1, 12),
        priority=st.integers(-1, 1),
        timeout=st.sampled_from([None, 1.0, 9.0]),
        tenant=st.sampled_from("xy"),
        namespace=st.sampled_from(["", "n"]),
    )
    def submit(self, length: int, want: int, priority: int, timeout: Any, tenant: str, namespace: str) -> None:
        rid = str(len(self.want))
        most = (self.core.pages - 1) * 4 + 1 - length
        self.want[rid], self.got[rid] = min(want, most), 0
        self.due[rid] = self.now + min(timeout or np.inf, self.timeout or np.inf)
        params = SamplingParams(max_tokens=want, ignore_eos=True)
        terms: dict[str, Any] = {"priority": priority if self.priority else 0, "timeout": timeout, "tenant": tenant}
        self.core.submit(rid, np.arange(1, length + 1, dtype=np.int32), params, namespace, **terms)

    @rule(pick=st.integers(0, 20))
    def abort(self, pick: int) -> None:
        live = self.live()
        if live and self.core.abort(rid := live[pick % len(live)]):
            self.ended[rid] = "abort"

    @rule(seconds=st.sampled_from([0.01, 0.3, 2.0]))
    def tick(self, seconds: float) -> None:
        self.now += seconds

    @rule(count=st.integers(1, 12))
    def steps(self, count: int) -> None:
        for _ in range(count):
            if self.core.has_work:
                for chunk in self.core.step():
                    self.take(chunk)

    def take(self, chunk: Chunk) -> None:
        assert chunk.rid not in self.ended, "a chunk after the last one"
        self.got[chunk.rid] += len(chunk.tokens)
        if chunk.finish is None:
            return
        self.ended[chunk.rid] = chunk.code or chunk.finish
        if chunk.code == "timeout":
            assert self.now >= self.due[chunk.rid]
        elif chunk.code == "queue_full":
            assert self.queued is not None
            assert self.got[chunk.rid] == 0, "it had begun"
        else:
            assert (chunk.finish, self.got[chunk.rid]) == ("length", self.want[chunk.rid])

    def live(self) -> list[str]:
        return [rid for rid in self.want if rid not in self.ended]

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "core"):
            self.core.scheduler.check()
            if self.queued is None:
                assert "queue_full" not in self.ended.values()

    def teardown(self) -> None:
        try:
            if hasattr(self, "core"):
                self.finish()
        finally:
            self.patch.stop()

    def finish(self) -> None:
        self.now += limits.LOOK_SECONDS
        late = {rid for rid in self.live() if self.due[rid] <= self.now}
        self.steps(1)
        assert not late & set(self.live()), "an overdue request goes on"
        while self.core.has_work:
            self.steps(1)
        assert self.live() == []
        s, stats = self.core.scheduler, self.core.stats()
        assert (s.running, s.waiting, s.pages_used) == (0, 0, 0)
        codes = list(self.ended.values())
        assert (stats.refused, stats.expired) == (codes.count("queue_full"), codes.count("timeout"))


TestTraffic: Callable[..., Any] = Traffic.TestCase
Traffic.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
