"""Runs cases in a child process, which is replaced when a case hangs or takes it down.

The pipe carries one way: what the opened backend says of itself, or as text why it could not be opened, and then one
Result per case in order. So the case in progress is always the first one without a result.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Event, Lock
from typing import Any

from polyradix.backend.protocol import Backend
from polyradix.backend.registry import DeviceError, open_backend
from polyradix_conformance.cases import all_cases
from polyradix_conformance.runner import Result, run

OPEN_S = 120.0  # the least time a backend has to be imported and created
END_S = 10.0  # what a child that is done has to leave by itself
SLICE_S = 0.5
LOST = 3  # after so many lost children the rest of a share is not run


class Refused(Exception):
    """The backend cannot be opened; the message says why."""


class _Lost(Exception):
    """The child hangs or is gone."""


class _Stopped(Exception):
    """Another share has failed, or the user has had enough."""


@dataclass(frozen=True)
class Job:
    """A backend to be opened: its entry point's name, and the options of its `create`."""

    backend: str
    emulate: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self, tp: int) -> Backend:
        """Split over `tp` ranks. Raises whatever the backend raises."""
        ranks = {} if tp == 1 else {"tp": tp}
        return open_backend(self.backend, emulate=self.emulate, **{**self.options, **ranks})


@dataclass(frozen=True)
class Claims:
    """What an opened backend says of itself, as JSON values."""

    caps: dict[str, Any]
    device: str
    emulated: bool
    notes: list[str]

    @classmethod
    def of(cls, backend: Backend) -> Claims:
        c = backend.caps
        caps: dict[str, Any] = {
            "dtypes": sorted(c.dtypes),
            "page_sizes": [int(n) for n in c.page_sizes],
            "max_head_dim": int(c.max_head_dim),
            "head_dim_multiple": int(c.head_dim_multiple),
            "features": sorted(c.features),
            "batch_invariant": bool(c.batch_invariant),
            "async_launch": bool(c.async_launch),
            "max_tp": int(c.max_tp),
        }
        if caps["head_dim_multiple"] < 1:
            raise ValueError(f"caps.head_dim_multiple is {c.head_dim_multiple}; expected at least 1")
        return cls(caps, str(c.device), bool(c.emulated), [str(n) for n in c.notes])


def supervise(
    job: Job, ids: Sequence[str], timeout: float, seen: Callable[[Result], None] = lambda r: None, shares: int = 1
) -> tuple[Claims, list[Result]]:
    """One result per case id (at least one), in order, `seen` as they come; a case may take `timeout` seconds. The
    cases are dealt out to `shares` children that run at the same time.

    Raises Refused when the backend cannot be opened at first; when it cannot later, the remaining cases are `not_run`.
    """
    stop, lock = Event(), Lock()

    def add(result: Result) -> None:
        with lock:
            seen(result)

    parts = [ids[i::shares] for i in range(min(shares, len(ids)))]
    with ThreadPoolExecutor(len(parts)) as pool:
        running = [pool.submit(_share, job, part, timeout, add, stop) for part in parts]
        try:
            wait(running, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
    errors = [e for each in running if (e := each.exception()) and not isinstance(e, _Stopped)]
    if errors:
        raise errors[0]
    claims, results = running[0].result()[0], list[Any](ids)
    for i, each in enumerate(running):
        results[i :: len(parts)] = each.result()[1]
    return claims, results


def _share(
    job: Job, ids: Sequence[str], timeout: float, seen: Callable[[Result], None], stop: Event
) -> tuple[Claims, list[Result]]:
    results: list[Result] = []

    def add(result: Result) -> None:
        results.append(result)
        seen(result)

    claims, why = _attempt(job, ids, timeout, add, stop), ""
    for lost in range(1, LOST + 1):
        left = ids[len(results) :]
        if not left:
            break
        try:
            if lost == LOST:
                raise Refused(f"{LOST} processes were lost")
            _attempt(job, left, timeout, add, stop)
        except Refused as e:
            why = f"not run: {e}"
            break
    for id in ids[len(results) :]:
        add(Result(id, "not_run", 0.0, why))
    return claims, results


def _attempt(job: Job, ids: Sequence[str], timeout: float, add: Callable[[Result], None], stop: Event) -> Claims:
    """Runs cases in a child until it is lost, which is the result of the case it was in."""
    with closing(_Child(job, ids, stop)) as child:
        try:
            claims = child.hear(max(timeout, OPEN_S))
        except _Lost as e:
            raise Refused(f"while it was being opened, {e}") from e
        if not isinstance(claims, Claims):
            raise Refused(claims)
        for id in ids:
            start = time.monotonic()
            try:
                add(child.hear(timeout))
            except _Lost as e:
                add(Result(id, "error", round(time.monotonic() - start, 4), str(e)))
                break
        else:
            child.join(END_S)
    return claims


class _Child:
    def __init__(self, job: Job, ids: Sequence[str], stop: Event) -> None:
        self._stop = stop
        spawn = get_context("spawn")
        self._pipe, theirs = spawn.Pipe(duplex=False)
        self._process = spawn.Process(target=_serve, args=(theirs, job, list(ids)))
        self._process.start()
        self.join = self._process.join
        theirs.close()

    def hear(self, timeout: float) -> Any:
        """What it says next. Raises _Lost, or _Stopped."""
        end = time.monotonic() + timeout
        while not self._pipe.poll(min(SLICE_S, max(0.0, end - time.monotonic()))):
            if self._stop.is_set():
                raise _Stopped
            # A process that the child started may hold the pipe open after the child's death.
            if not self._process.is_alive() and not self._pipe.poll():
                raise _Lost(self._fate())
            if time.monotonic() >= end:
                raise _Lost(f"timed out after {timeout:g} s")
        try:
            return self._pipe.recv()
        except EOFError:
            raise _Lost(self._fate()) from None

    def _fate(self) -> str:
        self.join(END_S)
        code = self._process.exitcode
        if code is None:
            return "the process closed its pipe"
        return f"the process exited with {code}" if code >= 0 else f"the process died of {signal.strsignal(-code)}"

    def close(self) -> None:
        """Kills it, and what it started."""
        pid = self._process.pid
        assert pid is not None
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        self._process.kill()  # it may not have had the time to make its group
        self.join()
        self._pipe.close()


def _serve(pipe: Connection, job: Job, ids: list[str]) -> None:
    os.setsid()
    known = {c.id: c for c in all_cases()}
    try:
        backend = job.open(1)
        claims = Claims.of(backend)
    except DeviceError as e:
        return pipe.send(str(e))
    except Exception as e:
        return pipe.send(f"{type(e).__name__}: {e}")
    pipe.send(claims)
    run((known[id] for id in ids), lambda tp: backend if tp == 1 else job.open(tp), pipe.send)
