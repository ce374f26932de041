"""How many requests may wait, and for how long any may take."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Literal

from polyradix.engine.config import EngineConfig
from polyradix.engine.grammars import Gate
from polyradix.engine.messages import Chunk
from polyradix.schedule.params import InvalidParam
from polyradix.schedule.request import Request
from polyradix.schedule.scheduler import Scheduler

LOOK_SECONDS = 0.05  # between looks at the deadlines


class Limiter:
    """Ends requests that find the queue full or are overdue."""

    def __init__(self, config: EngineConfig, scheduler: Scheduler, gate: Gate) -> None:
        self._config, self._scheduler, self._gate = config, scheduler, gate
        self._ended: list[Chunk] = []
        self._next_look = 0.0
        self.refused = 0  # totals
        self.expired = 0

    @property
    def has_work(self) -> bool:
        return bool(self._ended)

    def check(self, req: Request, timeout: float | None) -> None:
        """Sets the request's deadline. Raises InvalidParam."""
        if req.priority and self._config.policy != "priority":
            raise InvalidParam("priority", req.priority, f"0: the server's policy is {self._config.policy}")
        if timeout is not None and not (timeout > 0 and math.isfinite(timeout)):
            raise InvalidParam("timeout", timeout, "a number of seconds above 0")
        limits = [limit for limit in (timeout, self._config.request_timeout) if limit is not None]
        if limits:
            req.timeout = min(limits)
            req.deadline = monotonic() + req.timeout

    @contextmanager
    def room_for(self, req: Request) -> Iterator[None]:
        """Where a request is queued. If the queue was full, it or a less important one is refused."""
        most = self._config.max_queued_requests
        full = most is not None and self._scheduler.excess + len(self._gate) >= most
        yield
        if full:
            last = self._scheduler.last_waiting()
            self._end(last if last is not None and last.rank[0] > req.priority else req, "queue_full")

    def ended(self) -> list[Chunk]:
        """The last chunks of requests that were ended since."""
        now = monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_SECONDS
            for req in self._scheduler.overdue(now) + self._gate.overdue(now):
                self._end(req, "timeout")
        chunks, self._ended = self._ended, []
        return chunks

    def _end(self, req: Request, code: Literal["queue_full", "timeout"]) -> None:
        if not (self._gate.abort(req.rid) or self._scheduler.abort(req.rid)):
            return
        if code == "timeout":
            self.expired += 1
            text = f"the request was not done after {req.timeout:g} seconds, its timeout"
        else:
            self.refused += 1
            text = f"the queue is full: {self._config.max_queued_requests} requests wait already"
        self._ended.append(Chunk(rid=req.rid, tokens=[], finish="error", error=text, code=code))
