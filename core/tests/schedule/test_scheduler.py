from __future__ import annotations

import numpy as np
import pytest
from token_device import FakeDevice, expected

from polyradix.schedule.params import InvalidParam, SamplingParams
from polyradix.schedule.plan import Plan
from polyradix.schedule.request import Request
from polyradix.schedule.scheduler import Scheduler, SchedulerConfig


def device(**changes: object) -> FakeDevice:
    base = {"page_size": 4, "pages": 65, "max_tokens": 32, "max_seqs": 8, "max_context": 128}
    return FakeDevice(SchedulerConfig(**(base | changes)))  # type: ignore[arg-type]


def rids(plan: Plan | None) -> list[str]:
    assert plan is not None
    return [req.rid for req in plan.rows]


def chunk_sizes(plan: Plan | None) -> list[int]:
    assert plan is not None
    return np.diff(plan.host.cu_q).tolist()


def test_nothing_to_do_is_no_plan():
    d = device()
    assert d.launch() is None
    assert not d.scheduler.has_work


def test_a_long_prompt_is_chunked_and_decodes_come_first():
    d = device()
    short = d.add("short", [1, 2, 3], max_tokens=8)
    d.step()
    long = d.add("long", list(range(60)), max_tokens=2)
    plan = d.step()
    assert rids(plan) == ["short", "long"]
    assert chunk_sizes(plan) == [1, 31]
    assert d.outputs["long"] == []
    assert chunk_sizes(d.step()) == [1, 29]
    assert len(d.outputs["long"]) == 1
    d.drain()
    d.verify(short)
    d.verify(long)


def test_a_short_prefill_is_rows_of_one_token_where_the_device_prefers_them():
    d = device(single_rows=True)
    a = d.add("a", [1, 2, 3, 4, 5], max_tokens=9)
    assert chunk_sizes(d.step()) == [1] * 5
    b, c = d.add("b", [6, 7, 8], max_tokens=9), d.add("c", [9, 8, 7, 6], max_tokens=9)
    plan = d.step()
    assert rids(plan) == ["a", *["b"] * 3, *["c"] * 4]
    assert plan.host.kv_len.tolist() == [6, 1, 2, 3, 1, 2, 3, 4]
    long = d.add("long", list(range(11)))
    assert chunk_sizes(d.step()) == [1, 1, 1, 11]
    spread = d.add("spread", list(range(20, 28)))
    assert rids(d.step()) == ["a", "b", "c", "long", *["spread"] * 4]
    assert rids(d.step())[-4:] == ["spread"] * 4
    d.drain(depth=2)
    for req in (a, b, c, long, spread):
        d.verify(req)


def test_prefill_under_way_goes_before_new_requests():
    d = device(max_tokens=10)
    d.add("a", list(range(15)))
    d.step()
    d.add("b", list(range(20, 30)))
    plan = d.step()
    assert rids(plan) == ["a", "b"]
    assert chunk_sizes(plan) == [5, 5]


def test_max_seqs_bounds_what_runs():
    d = device(max_seqs=2)
    for i in range(3):
        d.add(str(i), [i, i, i])
    assert rids(d.step()) == ["0", "1"]
    assert (d.scheduler.running, d.scheduler.waiting) == (2, 1)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_overlapped_steps_give_the_same_tokens(depth):
    d = device()
    requests = [d.add(str(i), list(range(i, i + 9)), max_tokens=20, seed=i) for i in range(6)]
    d.drain(depth)
    for req in requests:
        d.verify(req)


def test_from_prev_names_the_row_of_the_plan_launched_last():
    d = device()
    d.add("a", [1, 2, 3])
    d.add("b", [4, 5, 6])
    d.launch()
    plan = d.launch()
    assert plan is not None
    assert plan.host.from_prev.tolist() == [0, 1]
    d.apply()
    d.apply()
    plan = d.launch()
    assert plan is not None
    assert plan.host.from_prev.tolist() == [-1, -1]
    assert plan.host.tokens.tolist() == [d.outputs["a"][-1], d.outputs["b"][-1]]


def test_no_row_is_wasted_on_a_request_that_must_end():
    d = device()
    d.add("a", [1, 2, 3], max_tokens=2)
    assert d.launch() is not None
    assert d.launch() is not None
    assert d.launch() is None


def test_a_stop_token_ends_a_request_and_late_samples_are_dropped():
    d = device()
    stop = expected(d.add("probe", [1, 2, 3], max_tokens=5), 128)[0][2]
    req = d.add("a", [1, 2, 3], max_tokens=50, stop_token_ids=(stop,))
    d.drain(2)
    d.verify(req)
    assert d.finish["a"] == "stop"
    assert d.out["a"].stop_token == stop


def test_eos_counts_unless_ignored():
    prompt = np.array([1, 2, 3], np.int32)
    assert Request("a", prompt, SamplingParams(stop_token_ids=(5,)), frozenset({9})).stops == {5, 9}
    assert Request("a", prompt, SamplingParams(stop_token_ids=(5,), ignore_eos=True), frozenset({9})).stops == {5}


def test_a_finished_request_keeps_its_pages_until_its_late_row_was_applied():
    d = device(radix=False)
    stop = expected(d.add("probe", [1, 2, 3], max_tokens=1), 128)[0][0]
    d.step()
    d.add("a", [1, 2, 3], max_tokens=50, stop_token_ids=(stop,))
    d.launch()
    d.launch()
    d.apply()
    assert d.finish["a"] == "stop"
    assert (d.scheduler.running, d.scheduler.pages_used) == (0, 1)
    d.apply()
    assert d.scheduler.pages_used == 0
    assert not d.scheduler.has_work


def test_a_second_turn_reuses_the_first():
    d = device()
    first = d.add("a", list(range(10)), max_tokens=8)
    d.drain()
    # 17 of the 18 tokens have KV, which is 4 full pages; the last sampled token was never computed.
    d.add("b", [*range(10), *first.outputs, 1, 2, 3])
    d.step()
    assert d.out["b"].req.cached_tokens == 16
    assert (d.scheduler.prompt_tokens, d.scheduler.cached_tokens) == (31, 16)


def test_a_full_hit_still_computes_the_last_token():
    d = device()
    d.add("a", list(range(8)), max_tokens=1)
    d.drain()
    req = d.add("b", list(range(8)), max_tokens=1)
    plan = d.step()
    assert chunk_sizes(plan) == [4]  # the match is capped below the last token, and pages are whole
    assert d.out["b"].req.cached_tokens == 4
    d.verify(req)


def test_namespaces_do_not_share():
    d = device()
    d.add("a", list(range(12)), namespace="x")
    d.drain()
    req = d.add("b", list(range(12)), namespace="y")
    d.drain()
    d.verify(req)
    assert d.out["b"].req.cached_tokens == 0


def test_radix_off_reuses_nothing_and_keeps_nothing():
    d = device(radix=False)
    for rid in "ab":
        d.add(rid, list(range(12)))
        d.drain()
        assert d.out[rid].req.cached_tokens == 0
    assert d.scheduler.pages_cached == 0


def test_a_shared_prefix_is_computed_once():
    d = device(max_tokens=64, max_seqs=16, pages=200)
    requests = [d.add(str(i), [*range(40), i], max_tokens=3) for i in range(12)]
    assert rids(d.launch()) == ["0"]
    d.launch()
    assert d.scheduler.waiting == 11  # held back while the prefix is in flight
    d.apply()
    assert len(rids(d.launch())) == 12
    d.drain()
    for req in requests:
        d.verify(req)
        assert req.cached_tokens == (0 if req.rid == "0" else 40)


def test_holding_back_lets_others_pass_and_ends_with_an_abort():
    d = device(max_tokens=64)
    d.add("a", [*range(40), 1])
    d.add("b", [*range(40), 2])
    d.add("c", list(range(50, 60)))
    assert rids(d.launch()) == ["a", "c"]
    d.scheduler.abort("a")
    assert rids(d.launch()) == ["c", "b"]


def test_nobody_waits_for_what_it_cannot_use():
    d = device(max_tokens=64)
    d.add("a", [1, 2, 3, 4, 5])
    d.add("same", [1, 2, 3, 4])  # its only page holds its last token, which it must compute anyway
    d.add("elsewhere", [1, 2, 3, 4, 5], namespace="x")
    assert rids(d.step()) == ["a", "same", "elsewhere"]


def test_a_page_that_is_not_full_is_not_worth_waiting_for():
    d = device(max_tokens=64)
    d.add("a", [1, 2, 3, 9])
    d.add("b", [1, 2, 3, 8, 8])
    assert rids(d.step()) == ["a", "b"]


def test_equal_prefixes_computed_apart_become_one():
    """`b` is prefilled while `a` decodes the same tokens, so nobody could hold it back; both insert them."""
    d = device()
    a = d.add("a", list(range(8)), max_tokens=30)
    for _ in range(9):
        d.step()
    b = d.add("b", [*range(8), *a.outputs[:8]], max_tokens=30)
    d.step()
    d.drain(2)
    d.verify(a)
    d.verify(b)
    d.scheduler.flush()
    assert d.scheduler.pages_used == 0


def admitted(policy: str, count: int = 3) -> list[str]:
    """The order in which requests with 0, 8 and 16 cached tokens are admitted, after `count` - 3 others."""
    d = device(policy=policy, max_tokens=400, max_seqs=400, pages=2000)
    d.add("warm", list(range(20)))
    d.drain()
    for i in range(count - 3):
        d.add(f"other{i}", [60, 61])
    d.add("none", [50] * 17)
    d.add("some", [*range(8), 51])
    d.add("most", [*range(16), 52])
    return [rid for rid in rids(d.step()) if not rid.startswith("other")]


def test_lpm_admits_the_longest_cached_prefix_first_and_fcfs_does_not():
    assert admitted("lpm") == ["most", "some", "none"]
    assert admitted("fcfs") == ["none", "some", "most"]


def test_lpm_falls_back_to_fcfs_when_many_wait():
    assert admitted("lpm", count=128) == ["most", "some", "none"]
    assert admitted("lpm", count=129) == ["none", "some", "most"]


def test_cached_prefixes_are_evicted_before_anything_is_retracted():
    d = device(pages=9)  # 32 tokens
    d.add("old", list(range(20, 40)), max_tokens=1)
    d.drain()
    assert d.scheduler.pages_cached == 5
    req = d.add("new", list(range(16)), max_tokens=16)
    d.step()
    assert d.scheduler.pages_cached == 4  # 3 pages were free; no more goes than must
    d.drain(2)
    d.verify(req)
    assert d.scheduler.retracted == 0


def test_the_newest_request_is_retracted_and_resumes_with_the_same_tokens():
    d = device(pages=9, page_size=4)  # 32 tokens
    requests = [d.add(rid, [i] * 7, max_tokens=24, seed=i) for i, rid in enumerate("abc")]
    order: list[str] = []
    while d.scheduler.has_work:
        before = d.scheduler.retracted
        running = rids(d.step())
        if d.scheduler.retracted > before:
            order.append(running[-1])
            assert "a" in running, "the oldest request never yields"
    assert order
    for req in requests:
        d.verify(req)
    assert list(d.finish) == ["a", "b", "c"]


def test_retraction_waits_until_nothing_is_in_flight():
    d = device(pages=5, radix=False)  # 16 tokens
    a = d.add("a", [1] * 6, max_tokens=10)
    b = d.add("b", [2] * 4, max_tokens=10)
    while d.launch() is not None:
        assert d.scheduler.retracted == 0
        if len(d.flights) == 2:
            d.apply()
    assert d.flights
    while d.flights:
        d.apply()
    assert rids(d.launch()) == ["a"]
    assert (d.scheduler.retracted, d.scheduler.waiting) == (1, 1)
    d.drain(2)
    d.verify(a)
    d.verify(b)


def test_a_lone_request_that_fills_the_pool_ends_with_length():
    d = device(pages=4)  # 12 tokens, and one more whose KV is not kept
    req = d.add("a", [1, 2, 3], max_tokens=50)
    d.drain(2)
    d.verify(req)
    assert (len(req.outputs), d.finish["a"]) == (10, "length")


def test_max_context_ends_with_length():
    d = device(max_context=10)
    req = d.add("a", [1, 2, 3], max_tokens=50)
    d.drain(2)
    d.verify(req)
    assert (len(req.outputs), d.finish["a"]) == (7, "length")


def test_abort_while_waiting_running_and_in_flight():
    d = device(max_seqs=2)
    for rid in "abc":
        d.add(rid, [ord(rid)] * 9, max_tokens=9)
    d.launch()
    assert d.scheduler.abort("c")
    assert d.scheduler.abort("a")
    assert not d.scheduler.abort("a")
    assert not d.scheduler.abort("nobody")
    d.drain(2)
    assert list(d.finish) == ["b"]
    assert d.outputs["a"] == d.outputs["c"] == []
    assert d.scheduler.pages_used == 0


def test_what_was_not_applied_is_not_shared():
    """An aborted request's step may have failed, so its KV must not be found by others."""
    d = device()
    d.add("a", list(range(20)))
    d.launch()
    d.scheduler.abort("a")
    d.apply()
    d.add("b", list(range(20)))
    d.step()
    assert d.out["b"].req.cached_tokens == 0


def test_an_id_may_be_used_again_while_its_late_row_is_in_flight():
    d = device()
    d.add("a", [1, 2, 3])
    d.launch()
    d.scheduler.abort("a")
    req = d.add("a", [4, 5, 6])
    d.drain(2)
    d.verify(req)


def test_logprobs_belong_to_their_token():
    d = device()
    d.add("a", [1, 2, 3], logprobs=2)
    d.add("b", [4, 5, 6], logprobs=0)
    d.add("c", [7, 8, 9])
    plan = d.step()
    assert plan is not None
    assert plan.top_logprobs == 2
    token = d.outputs["a"][0]
    assert d.out["a"].logprobs == [(-token, [(token, 0), (token + 1, -1)])]
    assert d.out["b"].logprobs == [(-d.outputs["b"][0], [])]
    assert d.out["c"].logprobs is None


def test_how_rows_are_sampled():
    d = device()
    d.add("a", [1] * 5, seed=-3, temperature=0.5, top_k=-1, top_p=0.25, min_p=0.125)
    d.add("b", [2] * 3, temperature=0.0, top_k=7)
    plan = d.launch()
    assert plan is not None
    s = plan.sample
    assert s.temperature.tolist() == [0.5, 0]
    assert s.top_k.tolist() == [0, 7]
    assert s.top_p.tolist() == [0.25, 1]
    assert s.min_p.tolist() == [0.125, 0]
    assert s.seed.tolist() == [-3, 0]
    assert s.position.tolist() == [5, 3]
    assert s.seed.dtype == s.top_k.dtype == s.position.dtype == np.int32
    assert s.temperature.dtype == s.top_p.dtype == s.min_p.dtype == np.float32


def test_flush_keeps_what_is_in_use():
    d = device()
    d.add("a", list(range(8)), max_tokens=1)
    d.drain()
    req = d.add("b", [*range(8), 9], max_tokens=9)
    d.step()
    d.scheduler.flush()
    d.drain(2)
    d.verify(req)
    assert req.cached_tokens == 8


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "prompt is .*at least one token"),
        ([1] * 128, {}, "128 tokens.*at most 127.*context is 128"),
        ([1] * 13, {"pages": 4}, "13 tokens.*at most 12.*KV cache"),
    ],
)
def test_a_prompt_that_can_never_be_served_is_refused(prompt, changes, message):
    d = device(**changes)
    with pytest.raises(InvalidParam, match=message) as error:
        d.add("a", prompt)
    assert error.value.param == "prompt"
    assert not d.scheduler.has_work


def test_a_used_id_and_bad_params_are_refused():
    d = device()
    d.add("a", [1])
    with pytest.raises(InvalidParam, match="rid is 'a'"):
        d.add("a", [1])
    with pytest.raises(InvalidParam, match="max_tokens is 0"):
        d.add("b", [1], max_tokens=0)
    assert d.scheduler.waiting == 1


def test_apply_wants_launch_order_and_logprobs():
    d = device()
    d.add("a", [1, 2, 3], logprobs=1)
    first, second = d.launch(), d.launch()
    assert first is not None
    assert second is not None
    with pytest.raises(ValueError, match=r"plan 2 applied; expected plan 1"):
        d.scheduler.apply(second, np.zeros(1, np.int32))
    with pytest.raises(ValueError, match="logprobs is None; expected 1"):
        d.scheduler.apply(first, np.zeros(1, np.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 7}, r"max_tokens is 7; expected at least 8 \(max_seqs"),
        ({"page_size": 0}, "page_size is 0"),
        ({"pages": 1}, "pages is 1"),
        ({"max_seqs": 0}, "max_seqs is 0"),
        ({"max_context": 1}, "max_context is 1"),
        ({"policy": "lifo"}, "policy is 'lifo'; expected one of lpm, fcfs"),
    ],
)
def test_a_config_that_cannot_work_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        device(**changes)


def test_check_sees_a_lost_page():
    s = Scheduler(SchedulerConfig(4, 8, 8, 2, 32))
    s._ledger.pool.alloc(1)
    with pytest.raises(AssertionError, match="lost"):
        s.check()
