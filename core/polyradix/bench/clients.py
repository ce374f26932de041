"""What a benchmark may ask: any OpenAI-compatible server, or an engine in this process. Answers are greedy, and as long
as was asked for unless a schema ends them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import msgspec

from polyradix.bench.measure import Ask, Event, Message
from polyradix.bench.workload import Talk
from polyradix.engine.offline import Engine
from polyradix.grammar.spec import GrammarSpec

if TYPE_CHECKING:
    import aiohttp


def over_http(session: aiohttp.ClientSession, url: str, model: str) -> Ask:
    """Completions for a prompt, chat completions for turns."""

    async def ask(talk: Talk, messages: list[Message]) -> AsyncIterator[Event]:
        body: dict[str, Any] = {"model": model, "max_tokens": talk.output, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}, "ignore_eos": talk.schema is None}
        if talk.schema is not None:
            schema = {"name": "bench", "schema": talk.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        body |= {"messages": messages} if talk.turns else {"prompt": talk.prompt}
        path = "chat/completions" if talk.turns else "completions"
        async with session.post(f"{url}/v1/{path}", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    yield _event(_decode(line[6:]))

    return ask


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    """What is read of a stream event."""

    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


def _event(chunk: _Chunk) -> Event:
    if chunk.error:
        raise RuntimeError(str(chunk.error))
    event = Event()
    for choice in chunk.choices:
        event.text += choice.text or (choice.delta and choice.delta.content) or ""
    event.arrived = bool(event.text)
    if usage := chunk.usage:
        event.output_tokens, event.prompt_tokens = usage.completion_tokens, usage.prompt_tokens
        event.cached_tokens = (usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens) or 0
    return event


async def model_of(session: aiohttp.ClientSession, url: str) -> str:
    """The first model the server has."""
    async with session.get(f"{url}/v1/models") as response:
        response.raise_for_status()
        return str((await response.json())["data"][0]["id"])


def in_process(engine: Engine) -> Ask:
    async def ask(talk: Talk, messages: list[Message]) -> AsyncIterator[Event]:
        grammar = talk.schema and GrammarSpec(kind="json_schema", source=json.dumps(talk.schema), field="schema")
        prompt = talk.prompt
        if talk.turns or prompt is None:
            prompt = engine.tokenizer.encode(engine.tokenizer.chat_prompt(messages), add_special=False)
        elif isinstance(prompt, str):
            prompt = engine.tokenizer.encode(prompt)
        options: dict[str, Any] = {
            "max_tokens": talk.output,
            "temperature": 0,
            "ignore_eos": not grammar,
            "grammar": grammar,
        }
        async for piece in engine.async_stream(prompt, **options):
            event = Event(piece.text, len(piece.tokens), arrived=True)
            if piece.finish is not None:
                event.prompt_tokens, event.cached_tokens = len(prompt), piece.cached_tokens
            yield event

    return ask
