"""The process of a rank other than 0: makes a backend, then does what rank 0 says until that is gone."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist

from polyradix_torch.backend import TorchBackend
from polyradix_torch.mesh.collectives import Join
from polyradix_torch.mesh.messages import Window, unpacked
from polyradix_torch.mesh.rank import Rank

JOIN = timedelta(seconds=120)  # that ranks wait for each other at the start

Make = Callable[[int], TorchBackend]  # the backend of a rank, on a device of its own; it can be pickled


@dataclass(frozen=True)
class Place:
    """Where a rank belongs: `path` is a file that all ranks of the mesh see."""

    make: Make
    join: Join
    tp: int
    path: str

    def rank(self, number: int, made: TorchBackend, window: Window | None = None) -> Rank:
        """Waits for the others. Raises RuntimeError if they do not come."""
        store = dist.FileStore(self.path, self.tp)
        store.set_timeout(JOIN)
        rank = Rank(made, self.join(store, number, self.tp), number, self.tp, window)
        rank.meet()
        return rank


@dataclass(frozen=True)
class Raised:
    """Call `number` raised an error: its type's name, and what it said."""

    number: int
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"

    @classmethod
    def of(cls, number: int, error: BaseException) -> Raised:
        return cls(number, type(error).__name__, str(error))


def main(connection_fd: int, window_fd: int, number: int) -> None:
    """Of a process that rank 0 started with these open files."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 gets it too, and decides
    connection, window = Connection(connection_fd), Window(window_fd)
    inbox: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read, args=(connection, inbox), daemon=True).start()
    try:
        place: Place = pickle.loads(inbox.get())
        made = place.make(number)
        connection.send(None)
        inbox.get()
        rank = place.rank(number, made, window)
        connection.send(None)
    except Exception as error:
        connection.send(Raised.of(0, error))
        return
    held: dict[int, Any] = {}
    while True:
        _do(rank, inbox.get(), held, connection)


def _read(connection: Connection, inbox: SimpleQueue[bytes]) -> None:
    """Ends the process with rank 0, whatever it is waiting for."""
    while True:
        try:
            inbox.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def _do(rank: Rank, data: bytes, held: dict[int, Any], connection: Connection) -> None:
    call = unpacked(data, held)
    for number in call.dropped:
        held.pop(number, None)
    try:
        result = getattr(rank, call.method)(*call.args)
    except Exception as error:
        connection.send(Raised.of(call.number, error))
        return
    if call.keep is not None:
        held[call.keep] = result
    if call.answer:
        connection.send(result if call.keep is None else None)
