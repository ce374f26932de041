"""A fake engine: a thread that speaks the engine's messages. For tests of the server, and of clients, without a model.

Each request gets `answer(submit)`'s tokens, one per step, then stops if they ran out ("stop") or at max_tokens
("length"). Requests seen before count as cached.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import zmq

from polyradix.engine.messages import (
    Abort,
    Chunk,
    Chunks,
    Failed,
    FlushCache,
    FromEngine,
    Read,
    Ready,
    Stats,
    Submit,
    ToEngine,
    TokenLogProbs,
)


class ByteTokenizer:
    """One token a byte, and 256 to end. Chats become `role: content` lines."""

    eos_ids = frozenset({256})
    special_ids = frozenset({256})
    vocab_size = 257
    longest = 1
    template = ""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def chat_prompt(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        if messages[0]["role"] == "assistant":
            raise ValueError("the first message is the assistant's")
        return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "".join(
            f"{k}={v}" for k, v in kwargs.items()
        )


def prompt_of(submit: Submit) -> list[int]:
    return [int(t) for t in np.frombuffer(submit.tokens, "<i4")]


class FakeEngine:
    """A Worker. `submits` and `aborts` are what it saw; `failure` makes it fail instead of getting ready,
    `refuse` makes it refuse every request."""

    def __init__(
        self,
        answer: Callable[[Submit], list[int]] = prompt_of,
        *,
        step_seconds: float = 0.0,
        max_context: int = 256,
        failure: str = "",
        refuse: str = "",
    ) -> None:
        self.submits: list[Submit] = []
        self.aborts: list[str] = []
        self.flushes = 0
        self._answer, self._step_seconds, self._failure, self._refuse = answer, step_seconds, failure, refuse
        self._max_context = max_context
        self._running: dict[str, tuple[Submit, list[int], int]] = {}
        self._cached: set[str] = set()
        self._reads: list[Chunk] = []
        self._stop = threading.Event()

    def start(self, to_engine: str, from_engine: str, on_exit: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()

        def run() -> None:
            self._serve(to_engine, from_engine)
            if not loop.is_closed():
                loop.call_soon_threadsafe(on_exit, "the fake engine ended")

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def die(self) -> None:
        """As if the process had crashed; callable from any thread."""
        self._stop.set()

    @property
    def running(self) -> int:
        return len(self._running)

    def _serve(self, to_engine: str, from_engine: str) -> None:
        with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as outbox:
            inbox.connect(to_engine)
            outbox.connect(from_engine)
            outbox.setsockopt(zmq.LINGER, 1000)

            def send(message: FromEngine) -> None:
                outbox.send(msgspec.msgpack.encode(message))

            if self._failure:
                return send(Failed(self._failure))
            send(Ready(self._max_context, self._max_context - 1, {"device": "fake", "dtype": "none"}))
            while not self._stop.is_set():
                while inbox.poll(0 if self._running else 20):
                    self._take(msgspec.msgpack.decode(inbox.recv(), type=ToEngine))
                if self._reads:
                    send(Chunks(self._reads))
                    self._reads = []
                if self._running:
                    time.sleep(self._step_seconds)
                    send(Chunks([self._step(rid) for rid in list(self._running)]))
                send(Stats(running=len(self._running), pages_total=100, pages_used=len(self._running)))

    def _take(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            if any(s.tokens == message.tokens for s in self.submits):
                self._cached.add(message.rid)
            self._running[message.rid] = (message, self._answer(message), 0)
            self.submits.append(message)
        elif isinstance(message, Read):
            self._read(message)
        elif isinstance(message, Abort):
            self.aborts.append(message.rid)
            self._running.pop(message.rid, None)
        elif isinstance(message, FlushCache):
            self.flushes += 1

    def _read(self, read: Read) -> None:
        """An embedding says how many tokens there were; logprobs are -0.5 each."""
        n = len(read.tokens) // 4
        chunk = Chunk(read.rid, [], finish="stop", prompt_tokens=n)
        if read.want == "logprobs":
            chunk.logprobs = [TokenLogProbs(-0.5, [(97, -1.0)] * read.top) for _ in range(n - 1)]
        else:
            chunk.embedding = np.array([n, read.want == "mean", 0.5], "<f4").tobytes()
        if self._refuse:
            chunk = Chunk(read.rid, [], finish="error", error=self._refuse, param="input")
        self._reads.append(chunk)

    def _step(self, rid: str) -> Chunk:
        submit, tokens, at = self._running[rid]
        if self._refuse:
            del self._running[rid]
            return Chunk(rid, [], finish="error", error=self._refuse, param="prompt")
        chunk = Chunk(rid, tokens[at : at + 1], prompt_tokens=len(submit.tokens) // 4)
        chunk.cached_tokens = chunk.prompt_tokens if rid in self._cached else 0
        if chunk.tokens and chunk.tokens[0] in submit.params.stop_token_ids:
            chunk.finish, chunk.stop_token = "stop", chunk.tokens[0]
        elif at + 1 >= submit.params.max_tokens:
            chunk.finish = "length"
        elif at + 1 >= len(tokens):
            chunk.finish = "stop"
        if submit.params.logprobs is not None:
            top = [(token, -1.0 - i) for i, token in enumerate(range(97, 97 + submit.params.logprobs))]
            chunk.logprobs = [TokenLogProbs(-0.5, top) for _ in chunk.tokens]
        self._running[rid] = (submit, tokens, at + 1)
        if chunk.finish is not None:
            del self._running[rid]
        return chunk
