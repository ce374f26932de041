"""Which verbs run beside others, and who waits: on streams that write down what comes to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from polyradix_torch.triton.forked import Forked


class Device:
    """Two streams. An operation is (stream, what); waits are among them."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.now = "main"
        self.side = SimpleNamespace(
            wait_event=lambda event: self.seen.append(("side", f"wait for {event.at}")),
        )

    def event(self) -> Any:
        event = SimpleNamespace(at=None)
        event.record = lambda: setattr(event, "at", f"{self.now} {len(self.seen)}")
        return event

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.now = "side"
        yield
        self.now = "main"

    def verb(self, name: str) -> Any:
        def run(*given: Any, **named: Any) -> torch.Tensor:
            self.seen.append((self.now, name))
            return torch.zeros(1)

        return run


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    out = Device()
    main = SimpleNamespace(wait_stream=lambda stream: out.seen.append(("main", "wait for side")))
    for name, value in {"Event": out.event, "stream": out.stream, "current_stream": lambda: main}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return out


@pytest.fixture
def ops(device: Device) -> Any:
    verbs = ["norm", "moe", "linear_gated", "linear_reduce", "linear", "add"]
    return Forked(SimpleNamespace(**{name: device.verb(name) for name in verbs}), device.side)  # type: ignore[arg-type]


def test_shared_experts_run_beside_the_routed(device: Device, ops: Any) -> None:
    for _ in range(2):
        x = ops.norm()
        y = ops.moe(x, None, None)
        ops.add(y, ops.linear_reduce(ops.linear_gated(x, None, "silu"), None))
    one = [
        ("main", "norm"), ("main", "moe"), ("side", "wait for main {}"), ("side", "linear_gated"),
        ("side", "linear_reduce"), ("main", "wait for side"), ("main", "add"),
    ]  # fmt: skip
    assert device.seen == [(stream, what.format(at)) for at in (1, 8) for stream, what in one]


def test_nothing_else_does(device: Device, ops: Any) -> None:
    x, other = ops.norm(), torch.zeros(1)
    ops.linear_gated(x, None, "silu")
    ops.moe(x, None, None)
    ops.linear_gated(other, None, "silu")
    ops.linear_gated(x, None, "silu")
    ops.moe(x, None, None)
    ops.linear_reduce(x, None)
    assert {stream for stream, _ in device.seen} == {"main"}


@pytest.mark.parametrize("verb", ["norm", "linear", "linear_reduce", "linear_gated", "moe"])
def test_whatever_follows_waits(device: Device, ops: Any, verb: str) -> None:
    """What was made aside is in nobody's hands unless it was waited for, even given to one that could run aside."""
    x = ops.norm()
    ops.moe(x, None, None)
    made = ops.linear_gated(x, None, "silu")
    given = {"linear_gated": (made, None, "silu"), "moe": (made, None, None)}.get(verb, (x, None))
    getattr(ops, verb)(*given)
    assert device.seen[-2:] == [("main", "wait for side"), ("main", verb)]
