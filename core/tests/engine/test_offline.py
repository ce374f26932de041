"""`polyradix.Engine` in one process: together, streamed, from many tasks, and given up half-way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polyradix import Engine
from polyradix.schedule.params import InvalidParam

GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
TEXTS = ["one", "two and a half", "three", "a longer prompt than the others are"]


@pytest.fixture(scope="module")
def engine(byte_model: Callable[[int, str], Path]) -> Engine:
    sizes = {"max_seqs": 8, "max_tokens_per_step": 32, "kv_pages": 60}
    return Engine(str(byte_model(2, "")), device="numpy", load_format="dummy", embeddings=True, progress=False, **sizes)


@pytest.fixture
def alone(engine: Engine) -> list[Any]:
    """Of each text, generated on its own."""
    return [engine.generate(text, **GREEDY)[0] for text in TEXTS]


def at_rest(engine: Engine) -> bool:
    while engine.core.has_work:
        engine.core.step()
    engine.core.scheduler.check()
    return engine.core.scheduler.pages_used == 0 and not engine._runs


def test_together_streamed_and_in_tasks_give_the_same(engine: Engine, alone: list[Any]) -> None:
    want = [(c.text, c.tokens, c.finish) for c in alone]
    assert len({text for text, _, _ in want}) > 1
    assert [(c.text, c.tokens, c.finish) for c in engine.generate(TEXTS, **GREEDY)] == want
    for text, (said, tokens, finish) in zip(TEXTS, want, strict=True):
        pieces = list(engine.stream(text, **GREEDY))
        assert len(pieces) > 1
        assert "".join(p.text for p in pieces) == said
        assert [t for p in pieces for t in p.tokens] == tokens
        assert [p.finish for p in pieces] == [None] * (len(pieces) - 1) + [finish]

    async def streamed(text: str) -> str:
        return "".join([piece.text async for piece in engine.async_stream(text, **GREEDY)])

    async def main() -> tuple[list[str], list[Any]]:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, engine.core.scheduler.running)
                await asyncio.sleep(0)

        watcher = asyncio.create_task(watch())
        both = await asyncio.gather(
            asyncio.gather(*map(streamed, TEXTS)),
            asyncio.gather(*(engine.async_generate(text, **GREEDY) for text in TEXTS)),
        )
        watcher.cancel()
        assert most > 4, "tasks did not share the engine's batches"
        return both

    texts, lists = asyncio.run(main())
    assert texts == [said for said, _, _ in want]
    assert [(c.text, c.tokens, c.finish) for (c,) in lists] == want
    assert at_rest(engine)


def test_streams_may_be_mixed_with_everything(engine: Engine, alone: list[Any]) -> None:
    streams = [engine.stream(text, **GREEDY) for text in TEXTS[:2]]
    got = [next(stream).text for stream in streams]
    assert engine.generate(TEXTS[2], **GREEDY)[0].text == alone[2].text
    vectors = engine.embed(TEXTS)
    got = [first + "".join(p.text for p in stream) for first, stream in zip(got, streams, strict=True)]
    assert got == [c.text for c in alone[:2]]
    assert at_rest(engine)
    assert np.array(vectors).shape == (4, 32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(engine.embed(TEXTS[3])[0], vectors[3], atol=1e-6)


def test_giving_up_frees_the_pages(engine: Engine) -> None:
    stream = engine.stream("x", max_tokens=400, ignore_eos=True)
    next(stream)
    assert engine.core.scheduler.running == 1
    stream.close()
    assert at_rest(engine)

    async def main() -> None:
        task = asyncio.create_task(engine.async_generate(TEXTS, max_tokens=400, ignore_eos=True))
        for _ in range(3):
            await asyncio.sleep(0)
        assert engine.core.scheduler.running == 4
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert at_rest(engine)


def test_a_stop_string_ends_it(engine: Engine, alone: list[Any]) -> None:
    stop = alone[0].text[3:5]
    found = engine.generate(TEXTS[0], stop=[stop], **GREEDY)[0]
    assert (found.text, found.finish) == (alone[0].text.partition(stop)[0], "stop")
    assert "".join(p.text for p in engine.stream(TEXTS[0], stop=[stop], **GREEDY)) == found.text
    assert at_rest(engine)


def test_one_refused_prompt_stops_all(engine: Engine) -> None:
    with pytest.raises(InvalidParam, match="prompt"):
        engine.generate(["a", "", "b"])
    with pytest.raises(InvalidParam, match="prompt"):
        engine.embed("x" * 600)
    assert at_rest(engine)
