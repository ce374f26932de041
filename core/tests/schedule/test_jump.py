"""Jump-forward in the scheduler: the same tokens in fewer steps, whatever is in flight and however short pages are."""

from __future__ import annotations

import pytest
from token_device import FakeDevice

from polyradix.schedule.scheduler import SchedulerConfig


def _run(jumps: bool, depth: int, pages: int = 200, max_tokens: int = 40) -> tuple[dict[str, list[int]], FakeDevice]:
    device = FakeDevice(SchedulerConfig(3, pages, 24, 8, 120))
    requests = [device.add(f"r{i}", [1] * 7 + [i], max_tokens, i, forcing=True, jumps=jumps) for i in range(12)]
    requests += [device.add(f"f{i}", [2] * 9, max_tokens, i) for i in range(2)]
    device.drain(depth)
    for req in requests:
        device.verify(req)
    assert device.scheduler.pages_used == 0
    return device.outputs, device


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("pages", [200, 31])
def test_the_same_tokens_with_and_without(depth: int, pages: int) -> None:
    without, plain = _run(False, depth, pages)
    together, jumping = _run(True, depth, pages)
    assert together == without
    assert plain.scheduler.jumped_tokens == 0
    assert jumping.scheduler.jumped_tokens > 20
    assert jumping.scheduler._launched < plain.scheduler._launched


@pytest.mark.parametrize("depth", [1, 2])
def test_max_tokens_holds_at_every_length(depth: int) -> None:
    for most in range(1, 25):
        outputs, _ = _run(True, depth, max_tokens=most)
        assert max(map(len, outputs.values())) == most


@pytest.mark.parametrize("depth", [1, 2])
def test_a_stop_token_inside_a_run_ends_it_there(depth: int) -> None:
    whole, _ = _run(True, depth)
    for rid, tokens in whole.items():
        device = FakeDevice(SchedulerConfig(3, 200, 24, 8, 120))
        seed = int(rid[1:])
        forcing = rid.startswith("r")
        prompt = [1] * 7 + [seed] if forcing else [2] * 9
        for stop in set(tokens):
            req = device.add(f"{stop}", prompt, 40, seed, forcing=forcing, jumps=forcing, stop_token_ids=(stop,))
            device.drain(depth)
            device.verify(req)
            assert device.outputs[f"{stop}"] == tokens[: tokens.index(stop) + 1]


def test_what_is_forced_from_the_start_takes_no_step() -> None:
    for seed in range(40):
        device = FakeDevice(SchedulerConfig(3, 50, 24, 8, 99))
        req = device.add("r", [1], 30, seed, forcing=True, jumps=True)
        ahead = list(req.ahead)
        plan = device.step()
        assert plan is not None
        assert plan.host.num_tokens == 1 + len(ahead)
        assert device.outputs["r"][: len(ahead)] == ahead
        assert len(device.outputs["r"]) > len(ahead)
        if len(ahead) > 3:
            return
    raise AssertionError("no seed forces anything at the start")


def test_jumped_tokens_are_cached_under_their_ids() -> None:
    device = FakeDevice(SchedulerConfig(1, 200, 24, 8, 120))
    req = device.add("r", [1, 2], 40, 8, forcing=True, jumps=True)
    device.drain(2)
    assert device.scheduler.jumped_tokens > 3
    tokens = [1, 2, *device.outputs["r"]]
    device.add("again", [*tokens, 9], 3)
    device.drain(2)
    device.verify(req)
    assert device.out["again"].req.cached_tokens >= len(tokens) - 6  # all but the last run, if that ended it
