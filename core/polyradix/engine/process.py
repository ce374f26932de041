"""The engine process: an EngineCore between two ZMQ sockets. Messages are in messages.py."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import time
from types import FrameType

import msgspec
import numpy as np
import zmq

from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.messages import (
    Abort,
    Chunk,
    Chunks,
    Failed,
    FlushCache,
    FromEngine,
    Read,
    Ready,
    Submit,
    ToEngine,
)
from polyradix.schedule.params import InvalidParam

log = logging.getLogger(__name__)
STATS_SECONDS = 1.0


def run_engine(config: EngineConfig, to_engine: str, from_engine: str) -> None:
    """Serves until SIGTERM or until the parent is gone. Sends Ready or Failed first. Connects both endpoints:
    `to_engine` is pulled from, `from_engine` pushed to."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and decides
    signal.signal(signal.SIGTERM, _exit)
    context = zmq.Context()
    inbox, outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
    for socket, endpoint in ((inbox, to_engine), (outbox, from_engine)):
        socket.set_hwm(0)
        socket.connect(endpoint)
    outbox.setsockopt(zmq.LINGER, 2000)
    try:
        _Loop(config, inbox, outbox).run()
    except Exception as error:
        log.debug("the engine ended", exc_info=True)
        outbox.send(msgspec.msgpack.encode(Failed(error=f"{type(error).__name__}: {error}")))
    finally:
        context.destroy()


def _exit(signum: int, frame: FrameType | None) -> None:
    sys.exit(0)


class _Loop:
    def __init__(self, config: EngineConfig, inbox: zmq.Socket[bytes], outbox: zmq.Socket[bytes]) -> None:
        self._inbox, self._outbox = inbox, outbox
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)
        self._parent = os.getppid()
        self._core = EngineCore(config)
        self._next_stats = 0.0
        core = self._core
        longest = min(core.max_context - 1, (core.pages - 1) * core.page_size)  # leaves room for one output token
        self._send(Ready(max_context=core.max_context, max_prompt_tokens=longest, info=core.info()))

    def run(self) -> None:
        gc.collect()
        gc.freeze()
        while os.getppid() == self._parent:
            chunks = self._receive()
            if self._core.has_work:
                chunks += self._core.step()
            if chunks:
                self._send(Chunks(chunks))
            if self._core.lost:
                return self._send(Failed(error=self._core.lost))
            now = time.monotonic()
            if now >= self._next_stats or not self._core.has_work:
                self._send(self._core.stats())
                self._next_stats = now + STATS_SECONDS

    def _receive(self) -> list[Chunk]:
        """Takes all waiting messages; blocks for the first one only when there is nothing else to do."""
        refused: list[Chunk] = []
        if not self._core.has_work and not self._inbox.poll(int(STATS_SECONDS * 1000)):
            return refused
        while True:
            try:
                message = self._decoder.decode(self._inbox.recv(zmq.NOBLOCK))
            except zmq.Again:
                return refused
            if isinstance(message, Submit | Read):
                refused += self._submit(message)
            elif isinstance(message, Abort):
                self._core.abort(message.rid)
            elif isinstance(message, FlushCache):
                self._core.flush_cache()

    def _submit(self, m: Submit | Read) -> list[Chunk]:
        try:
            if isinstance(m, Read):
                self._core.read(m)
                return []
            tokens = np.frombuffer(m.tokens, np.int32)
            self._core.submit(
                m.rid, tokens, m.params, m.namespace, priority=m.priority, timeout=m.timeout, tenant=m.tenant
            )
        except InvalidParam as error:
            return [Chunk(rid=m.rid, tokens=[], finish="error", error=str(error), param=error.param)]
        return []

    def _send(self, message: FromEngine) -> None:
        self._outbox.send(self._encoder.encode(message))
