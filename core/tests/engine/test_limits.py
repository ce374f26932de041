"""A full queue and overdue requests, on a backend that computes nothing and with a clock that stands still."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyradix.engine import limits
from polyradix.engine.config import ConfigError, EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.messages import Chunk
from polyradix.grammar.spec import GrammarSpec
from polyradix.schedule.params import InvalidParam, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 1,
    "vocab_size": 97,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits, "monotonic", clock)
    return clock


@pytest.fixture
def make(tmp_path: Path, clock: Clock) -> Callable[..., EngineCore]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def make(**options: Any) -> EngineCore:
        base: dict[str, Any] = {"kv_pages": 40, "max_seqs": 2, "page_size": 4, "max_tokens_per_step": 24}
        base |= {"model": str(tmp_path), "device": "null", "load_format": "dummy", "progress": False}
        return EngineCore(EngineConfig(**(base | options)))

    return make


def submit(core: EngineCore, *rids: str, **terms: Any) -> None:
    for rid in rids:
        core.submit(rid, np.arange(1, 6, dtype=np.int32), SamplingParams(max_tokens=8, ignore_eos=True), **terms)


def finish(core: EngineCore) -> dict[str, Chunk]:
    """The last chunk of each request."""
    out = {}
    while core.has_work:
        out |= {chunk.rid: chunk for chunk in core.step()}
        core.scheduler.check()
    assert all(chunk.finish is not None for chunk in out.values())
    return out


def codes(core: EngineCore) -> dict[str, str]:
    return {rid: chunk.code or str(chunk.finish) for rid, chunk in finish(core).items()}


def test_as_many_may_wait_as_said_beyond_those_that_can_run(make: Callable[..., EngineCore]) -> None:
    core = make(max_queued_requests=1)
    submit(core, *"abcd")  # two run, one waits
    assert codes(core) == {"a": "length", "b": "length", "c": "length", "d": "queue_full"}
    assert (core.stats().refused, core.scheduler.pages_used) == (1, 0)
    submit(core, "e")
    assert codes(core) == {"e": "length"}


def test_rows_without_pages_do_not_count_as_room(make: Callable[..., EngineCore]) -> None:
    core = make(max_queued_requests=1, kv_pages=4, max_seqs=8)  # 12 tokens: one request at a time
    submit(core, *"ab")
    for _ in range(2):  # in the first, b waits for the page that a computes
        core.step()
    submit(core, "c")
    chunk = finish(core)["c"]
    assert chunk.code == "queue_full"
    assert chunk.error == "the queue is full: 1 requests wait already"


def test_a_more_important_request_takes_a_place_in_a_full_queue(make: Callable[..., EngineCore]) -> None:
    core = make(max_queued_requests=2, policy="priority")
    submit(core, *"abcd", priority=1)
    submit(core, "late", priority=1)
    submit(core, "high", priority=0)
    submit(core, "low", priority=5)
    found = codes(core)
    assert {rid for rid, code in found.items() if code == "queue_full"} == {"late", "d", "low"}


def test_who_waits_for_a_grammar_waits_and_may_be_overdue(make: Callable[..., EngineCore], clock: Clock) -> None:
    core = make(max_queued_requests=1, max_seqs=1, device="numpy")
    choice = SamplingParams(grammar=GrammarSpec(kind="choice", source='["a"]', field="response_format"))
    core.submit("g", np.ones(3, np.int32), choice, timeout=1.0)
    submit(core, *"ab")
    clock.now += 1
    assert codes(core) == {"g": "timeout", "a": "length", "b": "queue_full"}


@pytest.mark.parametrize(
    ("own", "server", "seconds"), [(2.0, None, 2.0), (None, 3.0, 3.0), (2.0, 3.0, 2.0), (9.0, 3.0, 3.0)]
)
def test_an_overdue_request_ends_and_frees_its_pages(
    make: Callable[..., EngineCore], clock: Clock, own: float | None, server: float | None, seconds: float
) -> None:
    core = make(request_timeout=server, max_seqs=1)
    submit(core, "runs", "waits", timeout=own)
    clock.now += seconds - 0.1
    assert all(chunk.finish is None for chunk in core.step())
    clock.now += 0.1
    found = finish(core)
    assert {rid: chunk.code for rid, chunk in found.items()} == {"runs": "timeout", "waits": "timeout"}
    assert found["runs"].error == f"the request was not done after {seconds:g} seconds, its timeout"
    assert (core.stats().expired, core.scheduler.pages_used) == (2, 0)


def test_without_a_timeout_none_ends(make: Callable[..., EngineCore], clock: Clock) -> None:
    core = make()
    submit(core, "a")
    clock.now += 1e9
    assert codes(core) == {"a": "length"}


@pytest.mark.parametrize(
    ("terms", "field", "message"),
    [
        ({"priority": 1}, "priority", "priority is 1; expected 0: the server's policy is lpm"),
        ({"timeout": 0.0}, "timeout", "timeout is 0.0; expected a number of seconds above 0"),
        ({"timeout": float("nan")}, "timeout", "timeout is nan"),
    ],
)
def test_terms_that_make_no_sense_are_refused(
    make: Callable[..., EngineCore], terms: Any, field: str, message: str
) -> None:
    core = make()
    with pytest.raises(InvalidParam, match=message) as error:
        submit(core, "a", **terms)
    assert error.value.param == field
    assert not core.has_work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_queued_requests": -1}, "max_queued_requests is -1; expected an integer >= 0"),
        ({"request_timeout": 0.0}, "request_timeout is 0.0; expected a number of seconds above 0"),
        ({"schedule_conservativeness": -1.0}, "schedule_conservativeness is -1.0; expected a number >= 0"),
        ({"chunked_prefill_size": 0}, "chunked_prefill_size is 0; expected an integer >= 1"),
        ({"eviction_policy": "priority"}, "eviction_policy is 'priority'; expected another with policy 'lpm'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(model="m", **options).check()


def test_options_reach_the_scheduler(make: Callable[..., EngineCore]) -> None:
    core = make(
        policy="priority", eviction_policy="slru", fair=True, chunked_prefill_size=3, schedule_conservativeness=2.0
    )
    c = core.scheduler.config
    assert (c.policy, c.eviction, c.fair, c.chunk, c.conservativeness) == ("priority", "slru", True, 3, 2.0)
