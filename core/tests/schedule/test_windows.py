"""What windowed groups spare, and that the scheduler keeps going when their pages run out."""

from __future__ import annotations

import numpy as np
import pytest
from token_device import FakeDevice

from polyradix.cache.blocks import Groups
from polyradix.graph.windows import layer_groups
from polyradix.schedule.params import SamplingParams
from polyradix.schedule.request import Request
from polyradix.schedule.scheduler import Scheduler, SchedulerConfig

LONG, PAGE, CHUNK = 32_768, 16, 2048
SHAPES = {  # layers, of which the last of so many is full, window; arrays in use, of all layers', from decision 024
    "gemma-3-27b": (62, 6, 1024, 0.190),
    "gpt-oss-20b": (24, 2, 128, 0.502),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_sequence_holds_its_full_pages_and_its_windows(shape):
    layers, every, window, share = SHAPES[shape]
    windowed = frozenset(i for i in range(layers) if (i + 1) % every)
    found = layer_groups(layers, windowed)
    of_window = sum(group[0] in windowed for group in found)
    groups, depth = Groups(len(found) - of_window, of_window, window), max(map(len, found))
    s = Scheduler(SchedulerConfig(PAGE, 10_000, CHUNK, 1, LONG, groups=groups, radix=False))
    s.add(Request("a", np.arange(LONG - 100, dtype=np.int32), SamplingParams(max_tokens=99)))
    prefill, decode = 0, 0
    while s.has_work:
        plan = s.plan()
        assert plan is not None
        if plan.host.num_tokens > 1:
            prefill = max(prefill, s.pages_used)
        s.apply(plan, np.zeros(1, np.int32))
        decode = s.pages_used or decode
    s.check()
    full = groups.full * LONG // PAGE
    assert prefill <= full + groups.windowed * (window + PAGE + CHUNK) // PAGE
    assert decode <= full + groups.windowed * (window + 2 * PAGE) // PAGE
    assert decode <= groups.pages(LONG, PAGE)
    assert decode * depth / (layers * LONG // PAGE) == pytest.approx(share, abs=0.002)


def running(groups: Groups, pages: int) -> int:
    """The most of 40 requests of 240 tokens that run at once."""
    s = Scheduler(SchedulerConfig(4, 1 + pages, 64, 40, 300, groups=groups, radix=False))
    for i in range(40):
        s.add(Request(str(i), np.full(160, i, np.int32), SamplingParams(max_tokens=80)))
    most = 0
    while s.has_work:
        plan = s.plan()
        assert plan is not None
        s.apply(plan, np.zeros(len(plan.rows), np.int32))
        most = max(most, s.running)
    return most


def test_more_sequences_run_at_once_in_the_same_memory():
    one, four = running(Groups(), 244), running(Groups(1, 3, 16), 4 * 244)  # a page has a quarter of the bytes
    assert one <= 6
    assert four >= 2 * one


def test_prefills_whose_windows_find_no_pages_yield_to_the_oldest():
    device = FakeDevice(SchedulerConfig(2, 1 + 44, 16, 4, 60, policy="priority", groups=Groups(1, 3, 8)))
    requests = [device.add(str(i), list(range(i, i + 26)), 6, priority=3 - i) for i in range(4)]
    for _ in range(3):
        device.launch()
    device.drain(2)
    for req in requests:
        device.verify(req)


def test_a_prompt_that_no_window_makes_fit_is_refused():
    s = Scheduler(SchedulerConfig(4, 1 + 20, 16, 2, 200, groups=Groups(1, 2, 8)))
    assert s._ledger.longest == 56  # 14 full pages, and 3 blocks of 2
    with pytest.raises(ValueError, match="prompt is '57 tokens'; expected at most 56"):
        s.add(Request("a", np.zeros(57, np.int32), SamplingParams()))


def test_lent_pages_are_of_all_groups():
    s = Scheduler(SchedulerConfig(4, 1 + 20, 16, 2, 200, groups=Groups(1, 2, 8)))
    assert s.capacity == 24
    pages = s.lend(9)
    assert pages is not None
    assert len(set(pages)) == 9  # three blocks of three
    s.check()
    assert s.lend(16) is None
    s.give_back(pages)
    s.check()


def test_a_step_reads_no_page_that_was_given_back():
    device = FakeDevice(SchedulerConfig(4, 100, 8, 2, 100, groups=Groups(1, 1, 6)))
    device.add("a", list(range(40)), 10)
    plans = [plan for _ in range(12) if (plan := device.step())]
    table = plans[-1].host.others[0].pages[0]
    first = (int(plans[-1].host.kv_len[0]) - 6) // 4
    assert not table[: first - 1].any()
    assert table[first:].all()
    assert plans[-1].host.pages[0].all()
