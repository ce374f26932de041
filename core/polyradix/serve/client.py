"""The HTTP process's side of the engine: submits requests over ZMQ, hands out chunks, notices when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
import shutil
import signal
import tempfile
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from polyradix.engine.config import EngineConfig
from polyradix.engine.messages import (
    Abort,
    Chunk,
    Chunks,
    FlushCache,
    FromEngine,
    Read,
    Ready,
    Stats,
    Submit,
    ToEngine,
)

log = logging.getLogger(__name__)
AT_ONCE = 64  # messages of the engine that are taken before others have their turn


class EngineDead(Exception):
    """The engine is not there (any more); the text says why."""


class Worker(Protocol):
    """What runs the engine. `start` is called once, inside the event loop."""

    def start(self, to_engine: str, from_engine: str, on_exit: Callable[[str], None]) -> None:
        """It connects to both endpoints. `on_exit` is called in the event loop, with the reason, when it ends."""

    def stop(self) -> None:
        """Ends it; returns when it is gone."""


class EngineProcess:
    """The real worker: `run_engine` in a spawned process. `log_level` is the process's own."""

    def __init__(self, config: EngineConfig, log_level: str = "info", stop_seconds: float = 5.0) -> None:
        self._config = config
        self._log_level = log_level
        self._stop_seconds = stop_seconds

    def start(self, to_engine: str, from_engine: str, on_exit: Callable[[str], None]) -> None:
        spawn = multiprocessing.get_context("spawn")
        args = (self._config, to_engine, from_engine, self._log_level)
        self._process = spawn.Process(target=_engine_main, args=args, name="polyradix-engine", daemon=True)
        # Inherited across the spawn: Ctrl-C reaches the whole process group, and ending the engine is ours to do.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._process.sentinel, self._ended, on_exit)

    def _ended(self, on_exit: Callable[[str], None]) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self._process.join(1)
        on_exit(f"the engine process ended with exit code {self._process.exitcode}")

    def stop(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self._process.terminate()
        self._process.join(self._stop_seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _engine_main(config: EngineConfig, to_engine: str, from_engine: str, log_level: str) -> None:
    from polyradix.engine.process import run_engine

    set_up_logging(log_level)
    run_engine(config, to_engine, from_engine)


def set_up_logging(level: str) -> None:
    logging.basicConfig(level=level.upper(), format="%(asctime)s %(levelname)s %(message)s")


class Call:
    """Requests submitted together. Use as a context manager: leaving it aborts whatever is still running, at once.

    `next` gives new chunks until every request has finished or was dropped."""

    def __init__(self, client: EngineClient, requests: Sequence[Submit | Read]) -> None:
        self._client = client
        self._requests = requests
        self._open: set[str] = set()
        self._chunks: list[Chunk] = []
        self._error = ""
        self._waiter: asyncio.Future[None] | None = None

    def __enter__(self) -> Call:
        for request in self._requests:
            self._client._submit(request, self)
            self._open.add(request.rid)
        return self

    def __exit__(self, *_: object) -> None:
        for rid in list(self._open):
            self.drop(rid)

    async def next(self) -> list[Chunk]:
        """All chunks since the last call, waiting for the first; empty when nothing is left to wait for. Raises
        EngineDead once the engine is gone."""
        while not self._chunks and self._open:
            if self._error:
                raise EngineDead(self._error)
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        chunks, self._chunks = self._chunks, []
        self._open.difference_update(c.rid for c in chunks if c.finish is not None)
        return chunks

    def drop(self, rid: str) -> None:
        """Abort one request and forget its chunks."""
        self._open.discard(rid)
        self._client._abort(rid)

    def _put(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        self._wake()

    def _fail(self, error: str) -> None:
        self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class EngineClient:
    """One engine. `ready` and `stats` are its latest words; `error` is why it is gone, empty while it is not."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._calls: dict[str, Call] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._settled: asyncio.Future[None]
        self.ready: Ready | None = None
        self.stats = Stats()
        self.error = ""

    async def start(self) -> None:
        """Starts the engine and returns at once; `wait_ready` waits for it. Raises nothing the engine does."""
        self._settled = asyncio.get_running_loop().create_future()
        self._folder = tempfile.mkdtemp(prefix="px-")
        self._context = zmq.asyncio.Context()
        self._push = self._context.socket(zmq.PUSH)
        self._pull = self._context.socket(zmq.PULL)
        to_engine, from_engine = f"ipc://{self._folder}/to", f"ipc://{self._folder}/from"
        for socket, endpoint in ((self._push, to_engine), (self._pull, from_engine)):
            socket.set_hwm(0)
            socket.setsockopt(zmq.LINGER, 0)
            socket.bind(endpoint)
        self._task = asyncio.create_task(self._receive())
        self._worker.start(to_engine, from_engine, self._exited)

    async def wait_ready(self) -> Ready:
        """Raises EngineDead if the engine could not start."""
        await asyncio.shield(self._settled)
        if self.ready is None:
            raise EngineDead(self.error)
        return self.ready

    def call(self, requests: Sequence[Submit | Read]) -> Call:
        """Requests with distinct new ids, submitted when the Call is entered."""
        return Call(self, requests)

    @property
    def busy(self) -> bool:
        """Whether a request is under way."""
        return bool(self._calls)

    def flush_cache(self) -> None:
        self._send(FlushCache())

    def refuse(self) -> None:
        """Ends whatever requests are left with an error, and lets no new ones in."""
        self._die("the server is shutting down")

    async def close(self) -> None:
        """Ends the engine and whatever requests are left."""
        self.refuse()
        self._worker.stop()
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._push.close()
        self._pull.close()
        self._context.term()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _submit(self, request: Submit | Read, call: Call) -> None:
        if self.ready is None or self.error:
            raise EngineDead(self.error or "the model is still loading")
        self._calls[request.rid] = call
        self._send(request)

    def _abort(self, rid: str) -> None:
        if self._calls.pop(rid, None) is not None and not self.error:
            self._send(Abort(rid))

    def _send(self, message: ToEngine) -> None:
        self._push.send(self._encoder.encode(message))  # goes out at once, or in order once the engine is connected

    async def _receive(self) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        try:
            for n in itertools.count(1):
                self._take(decoder.decode(await self._pull.recv()))
                if n % AT_ONCE == 0:
                    await asyncio.sleep(0)  # to receive what is there already does not let others run
        except Exception as error:
            log.exception("cannot read from the engine")
            self._lost(f"cannot read from the engine: {error}")

    def _take(self, message: FromEngine) -> None:
        if isinstance(message, Chunks):
            for chunk in message.chunks:
                done = chunk.finish is not None
                call = self._calls.pop(chunk.rid, None) if done else self._calls.get(chunk.rid)
                if call is not None:
                    call._put(chunk)
        elif isinstance(message, Stats):
            self.stats = message
        elif isinstance(message, Ready):
            self.ready = message
            self._settle()
        else:
            self._lost(message.error)

    def _settle(self) -> None:
        if not self._settled.done():
            self._settled.set_result(None)

    def _exited(self, reason: str) -> None:
        """Its last message may still be on the way, and says more."""
        asyncio.get_running_loop().call_later(0.2, self._lost, reason)

    def _lost(self, error: str) -> None:
        if not self.error and self.ready is not None:
            log.error("the engine is gone: %s", error)
        self._die(error)

    def _die(self, error: str) -> None:
        if self.error:
            return
        self.error = error
        calls = set(self._calls.values())
        self._calls.clear()
        for call in calls:
            call._fail(error)
        self._settle()
