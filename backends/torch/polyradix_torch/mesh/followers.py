"""Ranks 1 and up as rank 0 sees them: their processes, what they are told, what they answer, and that they are alive.

A rank may fail alone. Ranks that have taken part in different collectives wait for each other for ever, so the mesh is
then lost: the others are killed, which ends collectives over sockets, and rank 0's own group is aborted, which ends
those on a device. Whoever waits for a result then gets DeviceLost.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import wait
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from polyradix.backend.capabilities import DeviceLost
from polyradix_torch.mesh.follower import Place, Raised
from polyradix_torch.mesh.messages import Call, Held, Window, packed
from polyradix_torch.mesh.rank import Rank

T = TypeVar("T")
PATIENCE = 30.0  # seconds that ranks have to agree that a call has failed
LOOK = 0.5  # seconds between two looks at how things are
LEAVE = 5.0  # seconds that a process has to end by itself
ERRORS: dict[str, type[Exception]] = {"MemoryError": MemoryError, "DeviceLost": DeviceLost, "ValueError": ValueError}


class Follower:
    """A process that runs follower.main. `raised` is an error of a call that nobody waits for, and when it came."""

    def __init__(self, rank: int) -> None:
        self.rank, self.window = rank, Window()
        self.pipe, theirs = Pipe()
        self.answers: SimpleQueue[Any] = SimpleQueue()
        self.raised: tuple[Raised, float] | None = None
        fds = theirs.fileno(), self.window.fd
        code = f"from polyradix_torch.mesh.follower import main; main({fds[0]}, {fds[1]}, {rank})"
        path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )

    def fate(self) -> str:
        """Of one whose pipe is closed."""
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(LEAVE)
            return f"rank {self.rank} " + (f"exited with {code}" if code >= 0 else f"died: {signal.strsignal(-code)}")
        return f"rank {self.rank} closed its pipe"

    def end(self) -> None:
        self.pipe.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(LEAVE)
        self.process.kill()
        self.process.wait()
        self.window.close()


class Followers:
    """One thread, the caller's, tells and asks; another listens. `close` ends the processes."""

    def __init__(self, place: Callable[[str], Place], tp: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="polyradix-")
        self._place = place(os.path.join(self._folder.name, "store"))
        self._number = self._passed = self._asked = self._held = 0
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._rank: Rank | None = None
        self._aborting: threading.Thread | None = None
        self._dropped: deque[int] = deque()
        self._ended, self._end = Pipe(duplex=False)
        self._all = [Follower(rank) for rank in range(1, tp)]
        self._thread = threading.Thread(target=self._listen, name="polyradix-mesh", daemon=True)

    def start(self) -> Rank:
        """Rank 0. Raises what its backend or another's raises."""
        for each in self._all:
            each.pipe.send(self._place)
        self._thread.start()
        made = self._place.make(0)
        self._collect()
        for each in self._all:
            each.pipe.send(None)
        self._rank = self._place.rank(0, made)
        self._collect()
        return self._rank

    def hold(self) -> Held:
        """For what every rank is going to keep."""
        self._held += 1
        return Held(self._held, self._dropped)

    def check(self) -> None:
        """Raises DeviceLost when the mesh can do nothing more."""
        if self._lost is not None:
            raise DeviceLost(self._lost)

    def tell(self, own: Callable[[], T], method: str, *args: Any, keep: Held | None = None) -> T:
        """Has the others do a method of Rank, and does rank 0's `own` part. If that raises, its error comes out once
        the others are known to be no further."""
        number = self._post(Call(method, args, _number(keep)))
        try:
            result = own()
        except Exception as error:
            self._settle(error)
            raise
        except BaseException:  # nobody knows how far it came
            self._lose("rank 0 was interrupted")
            raise
        self._passed = number
        return result

    def ask(self, own: Callable[[], T], method: str, *args: Any, keep: Held | None = None) -> list[T]:
        """As tell, for methods without collectives: waits for all, and gives their results by rank, or raises the first
        error."""
        return self._ask(own, method, [args] * len(self._all), keep)

    def ask_each(
        self, own: Callable[[], T], method: str, args: Sequence[tuple[Any, ...]], keep: Held | None = None
    ) -> list[T]:
        """As ask, with arguments for each rank but rank 0."""
        return self._ask(own, method, args, keep)

    def windows(self) -> list[Window]:
        """Of each rank but rank 0."""
        return [each.window for each in self._all]

    def close(self) -> None:
        self._end.close()
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join()
        if self._rank is not None:
            self._rank.forget()
            self._abort()
        for each in self._all:
            each.end()
        if self._aborting is not None:
            self._aborting.join(LEAVE)
        self._folder.cleanup()

    def _post(self, call: Call, args: Sequence[tuple[Any, ...]] | None = None) -> int:
        self.check()
        self._number += 1
        dropped = tuple(self._dropped.popleft() for _ in range(len(self._dropped)))
        call = replace(call, number=self._number, dropped=dropped)
        if call.answer:
            self._asked = self._number
        data = packed(call) if args is None else b""
        for i, each in enumerate(self._all):
            try:
                each.pipe.send_bytes(data or packed(replace(call, args=(args or ())[i])))
            except OSError as error:
                self._lose(each.fate())
                raise DeviceLost(self._lost) from error
        return self._number

    def _ask(
        self,
        own: Callable[[], T],
        method: str,
        args: Sequence[tuple[Any, ...]],
        keep: Held | None,
        patience: float | None = None,
    ) -> list[T]:
        number = self._post(Call(method, (), _number(keep), answer=True), args)
        mine: T | Exception
        try:
            mine = own()
        except Exception as error:
            mine = error
        answers = self._collect(patience, mine if isinstance(mine, Exception) else None)
        self._passed = number
        return [mine, *answers]

    def _collect(self, patience: float | None = None, error: Exception | None = None) -> list[Any]:
        """An answer of each. Raises `error`, or what one of them raised."""
        answers = [self._answer(each, patience) for each in self._all]
        if error is not None:
            raise error
        for each, answer in zip(self._all, answers, strict=True):
            if isinstance(answer, Raised):
                raise ERRORS.get(answer.kind, RuntimeError)(f"rank {each.rank}: {answer}")
        return answers

    def _answer(self, each: Follower, patience: float | None) -> Any:
        start = time.monotonic()
        while True:
            with suppress(Empty):
                return each.answers.get(timeout=LOOK)
            if patience is not None and time.monotonic() - start > patience:
                self._lose(f"rank {each.rank} does not answer")
            self.check()

    def _settle(self, error: Exception) -> None:
        """After an error of rank 0. Raises DeviceLost unless all have taken part in the same collectives."""
        rank = self._rank
        assert rank is not None
        try:
            counts = self._ask(rank.calls, "calls", [()] * len(self._all), None, PATIENCE)
            if len(set(counts)) > 1:
                self._lose(f"ranks took part in {counts} collectives, after {type(error).__name__}: {error}")
            self.check()
        except DeviceLost as lost:
            raise lost from error
        for each in self._all:
            each.raised = None

    def _listen(self) -> None:
        pipes = {each.pipe: each for each in self._all}
        while True:
            ready = wait([*pipes, self._ended], LOOK)
            if self._ended in ready:
                return
            for pipe in ready:
                each = pipes[pipe]  # type: ignore[index]
                try:
                    self._heard(each, each.pipe.recv())
                except (EOFError, OSError):
                    del pipes[each.pipe]
                    self._lose(each.fate())
            for each in self._all:
                self._look(each)

    def _heard(self, each: Follower, message: Any) -> None:
        if isinstance(message, Raised) and message.number != self._asked:
            each.raised = message, time.monotonic()
        else:
            each.answers.put(message)

    def _look(self, each: Follower) -> None:
        """At an error of a rank: it is the mesh's end if rank 0 has got over the same call, or takes too long."""
        if (raised := each.raised) is None:
            return
        if self._passed >= raised[0].number or time.monotonic() - raised[1] > PATIENCE:
            self._lose(f"rank {each.rank}: {raised[0]}")

    def _lose(self, why: str) -> None:
        with self._lock:
            if self._lost is not None:
                return
            self._lost = why
        for each in self._all:
            each.process.kill()
        self._abort()

    def _abort(self) -> None:
        """Once, and by a thread of its own: who waits for a collective must hear of its end, not wait for all of it."""
        rank = self._rank
        if rank is None or self._aborting is not None:
            return

        def abort() -> None:
            with suppress(Exception):
                rank.abort()

        self._aborting = threading.Thread(target=abort, name="polyradix-abort", daemon=True)
        self._aborting.start()


def _number(held: Held | None) -> int | None:
    return None if held is None else held.number
