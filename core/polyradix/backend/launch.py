"""Launches for host backends: at once, or in order on one worker thread, so that overlap is testable on any host."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


def resolve(x: Any) -> Any:
    """The value behind a handle: a launch's Future is waited for, anything else is its own value."""
    return x.result() if isinstance(x, Future) else x


class Launcher:
    """Runs functions in the order they are given. With `asynchronous` a result is a Future, and an error shows where
    the value is used: on a later launch, or when it is fetched."""

    def __init__(self, asynchronous: bool) -> None:
        self._pool = ThreadPoolExecutor(1, "polyradix-launch") if asynchronous else None

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        """fn(*args) with handles resolved; its value, or a handle of it."""
        if self._pool is None:
            return fn(*args)
        return self._pool.submit(lambda: fn(*map(resolve, args)))

    def split(self, fn: Callable[..., tuple[Any, ...]], count: int, *args: Any) -> tuple[Any, ...]:
        """As run, for an fn that returns a tuple of `count` values: one value or handle for each."""
        whole = self.run(fn, *args)
        return tuple(self.run(lambda values, i=i: values[i], whole) for i in range(count))

    def future(self, fn: Callable[..., Any], *args: Any) -> Future[Any]:
        """As run, and always a Future."""
        value = self.run(fn, *args)
        if isinstance(value, Future):
            return value
        done: Future[Any] = Future()
        done.set_result(value)
        return done
