"""Several tokens or chunks that come together are given out as they would be one by one."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from polyradix.engine.messages import Chunk, FromEngine, Stats, TokenLogProbs
from polyradix.schedule.params import SamplingParams
from polyradix.serve.client import EngineClient
from polyradix.serve.errors import ApiError
from polyradix.serve.fake import ByteTokenizer, FakeEngine
from polyradix.serve.generation import Choice, Generation
from polyradix.serve.metrics import Metrics
from polyradix.serve.parsers.base import Parser
from polyradix.serve.parsers.feed import Arguments, Call, Event, Feed, Reasoning, Text
from polyradix.serve.parsers.hermes import Hermes
from polyradix.serve.parsers.thinking import think

TEXT = b'{"key": 1}'


def _run(size: int, stop: tuple[str, ...], logprobs: bool) -> tuple[object, ...]:
    choice = Choice(0, [1, 2], SamplingParams(), ByteTokenizer(), stop)
    text, tokens, entries = "", list[int](), list[int]()
    for at in range(0, len(TEXT), size):
        part = list(TEXT[at : at + size])
        values = [TokenLogProbs(-1.0, []) for _ in part] if logprobs else None
        piece = choice.push(Chunk("r", part, values, "length" if at + size >= len(TEXT) else None))
        text, tokens = text + piece.text, tokens + piece.tokens
        entries += [token for token, _ in piece.entries]
        if piece.finish is not None:
            break
    return text, tokens, entries, choice.output_tokens, choice.finish


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("stop", [(), ("ey",), ("k", "y"), ("}",), ("zz",)])
def test_chunks_of_any_size(stop: tuple[str, ...], logprobs: bool) -> None:
    single = _run(1, stop, logprobs)
    if stop == ("ey",):
        assert single[0] == '{"k'
        assert single[3:] == (5, "stop")
    assert all(_run(size, stop, logprobs) == single for size in (2, 3, 7, len(TEXT)))


@pytest.mark.parametrize(
    "tail", ["", "<tool_call>{}</tool_call>", '<tool_call>{"name": "now", "arguments": {}}</tool_call>']
)
def test_reasoning_is_counted_however_many_tokens_come_together(tail: str) -> None:
    """One call is wanted: a second one ends the output at its name, the tokens after it do not count."""
    output = list(f"<think>Hm.</think>Wait.{tail * 2}".encode())

    def run(size: int) -> tuple[list[str], tuple[object, ...]]:
        feed = Feed()
        script = think(feed, False, Hermes().parse(feed, {"now": None}))
        choice = Choice(0, [1], SamplingParams(), ByteTokenizer(), parser=Parser(feed, script, single=True))
        kinds: tuple[type[Event], ...] = (Reasoning, Text, Call, Arguments)
        found, tokens = [""] * 4, 0
        for at in range(0, len(output), size):
            piece = choice.push(Chunk("r", output[at : at + size], None, "stop" if at + size >= len(output) else None))
            tokens += len(piece.tokens)
            for event in piece.events:
                found[kinds.index(type(event))] += event.name if isinstance(event, Call) else event.text
            if piece.finish is not None:
                break
        return found, (tokens, choice.output_tokens, choice.reasoning_tokens, choice.finish)

    single = run(1)
    assert single[0][0::2] == ["Hm.", "now" if "now" in tail else ""]
    assert single[1][2] == len("Hm.</think>")
    assert all(run(size) == single for size in (2, 3, 7, 16, len(output)))


class _Arrived:
    """A client whose call has all its chunks at once."""

    stats, ready, error = Stats(), None, ""

    def __init__(self, chunks: list[Chunk]) -> None:
        self._chunks = chunks

    def call(self, requests: object) -> _Arrived:
        return self

    async def next(self) -> list[Chunk]:
        chunks, self._chunks = self._chunks, []
        return chunks


def test_what_came_before_an_error_is_given_out() -> None:
    choice = Choice(0, [1, 2], SamplingParams(), ByteTokenizer())
    failed = Chunk(choice.rid, [], finish="error", error="why", code="timeout")
    client: Any = _Arrived([Chunk(choice.rid, [97]), Chunk(choice.rid, [98]), failed])
    run = Generation(client, Metrics(client), [choice], 0.0)
    ((_, piece),) = asyncio.run(run.next())
    assert piece.text == "ab"
    with pytest.raises(ApiError, match="why"):
        asyncio.run(run.next())


def test_an_engine_that_never_pauses_lets_others_run() -> None:
    """All its messages are there at once."""
    left = 10_000

    class Socket:
        async def recv(self) -> bytes:
            nonlocal left
            left -= 1
            if left == 0:
                raise asyncio.CancelledError
            message: FromEngine = Stats()
            return msgspec.msgpack.encode(message)

    async def run() -> int:
        client: Any = EngineClient(FakeEngine())
        client._pull = Socket()
        task = asyncio.create_task(client._receive())
        await asyncio.sleep(0)
        turn = left
        await asyncio.wait([task])
        return turn

    assert asyncio.run(run()) > 9_000
