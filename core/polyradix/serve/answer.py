"""How a generation is answered: one JSON body, or server-sent events. Both end at once when the client hangs up."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polyradix.engine.messages import TokenLogProbs
from polyradix.serve.errors import ApiError
from polyradix.serve.generation import Choice, Generation, Piece, Tokens
from polyradix.serve.parsers.feed import Arguments, Call, Event, Reasoning, Text
from polyradix.serve.replies import (
    AnswerMessage,
    ChatLogProb,
    ChatLogProbs,
    CompletionLogProbs,
    Delta,
    DeltaChoice,
    FunctionDelta,
    Generated,
    MessageChoice,
    Reply,
    TextChoice,
    ToolCall,
    TopLogProb,
    Usage,
    usage,
)

LEAST = -9999.0  # stands for minus infinity, which JSON has not
_encode = msgspec.json.Encoder().encode


class Answer(Response):
    """Runs `work(send)` and cancels it when the client hangs up. Errors before the answer started get their status."""

    def __init__(self, work: Callable[[Send], Awaitable[None]]) -> None:
        super().__init__()
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._work(send))
        gone = asyncio.ensure_future(_hang_up(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def _hang_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Form(Protocol):
    """The shape of an answer: `piece` is one stream event (a list: several; None: nothing to say), and `whole` the full
    body. An event that is a dict has its name in `type`."""

    closing: bytes = b"data: [DONE]\n\n"

    def piece(self, choice: Choice, piece: Piece) -> object: ...
    def whole(self, run: Generation, pieces: list[list[Piece]]) -> object: ...
    def last(self, run: Generation) -> object: ...  # the stream's closing event
    def failure(self, error: ApiError) -> bytes:
        """What ends a stream that broke."""
        return b"data: " + error.body() + b"\n\n"


def answer(run: Generation, form: Form, stream: bool, before: Callable[[], Awaitable[None]] | None = None) -> Answer:
    """`before` is waited for first."""

    async def work(send: Send) -> None:
        if before is not None:
            await before()
        await (_stream if stream else _whole)(run, form, send)

    return Answer(work)


async def _whole(run: Generation, form: Form, send: Send) -> None:
    got: list[list[Piece]] = [[] for _ in run.choices]
    with run:
        while pieces := await run.next():
            for choice, piece in pieces:
                got[choice.index].append(piece)
    await send_json(send, form.whole(run, got))


async def send_json(send: Send, value: object) -> None:
    body = _encode(value)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(run: Generation, form: Form, send: Send) -> None:
    with run:
        pieces = await run.next()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        try:
            while pieces:
                events = b"".join(_events(form.piece(choice, piece)) for choice, piece in pieces)
                if events:
                    await send({"type": "http.response.body", "body": events, "more_body": True})
                pieces = await run.next()
            end = _events(form.last(run)) + form.closing
        except ApiError as error:
            end = form.failure(error)
    await send({"type": "http.response.body", "body": end})


def _events(value: object) -> bytes:
    if value is None:
        return b""
    if isinstance(value, list):
        return b"".join(map(_events, value))
    name = f"event: {value['type']}\n".encode() if isinstance(value, dict) else b""
    return name + b"data: " + _encode(value) + b"\n\n"


class OpenAIForm(Form):
    """What chat and completion answers share."""

    prefix: str
    kind: str
    kind_chunk: str

    def __init__(self, model: str, tokenizer: Tokens, include_usage: bool, each: bool) -> None:
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._usage, self._each = include_usage, each  # at the end, and in each chunk what its choice has

    def _chunk(self, of: Choice, choices: list[DeltaChoice] | list[TextChoice]) -> Reply:
        found: Usage | UnsetType | None = None if self._usage else UNSET
        if self._each:
            found = usage(len(of.prompt), of.output_tokens, of.cached_tokens, of.reasoning_tokens)
        return Reply(self._id, self.kind_chunk, self._created, self._model, choices, found)

    def _reply(self, run: Generation, choices: list[MessageChoice] | list[TextChoice]) -> Reply:
        return Reply(self._id, self.kind, self._created, self._model, choices, usage(*run.counts()))

    def last(self, run: Generation) -> Reply | None:
        if not self._usage:
            return None
        nothing: list[TextChoice] = []
        return Reply(self._id, self.kind_chunk, self._created, self._model, nothing, usage(*run.counts()))


class ChatForm(OpenAIForm):
    prefix, kind, kind_chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Tokens, include_usage: bool, each: bool) -> None:
        super().__init__(model, tokenizer, include_usage, each)
        self._begun: set[int] = set()
        self._calls: dict[int, int] = {}  # of each choice, the index of its newest tool call

    def piece(self, choice: Choice, piece: Piece) -> Reply | None:
        delta = self._delta(choice, piece.events)
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            delta.role, delta.content = "assistant", delta.content or ""
        elif not piece.events and not piece.entries and piece.finish is None:
            return None
        logprobs = self._logprobs(piece.entries) if piece.entries else None
        return self._chunk(choice, [DeltaChoice(choice.index, delta, logprobs, piece.finish)])

    def _delta(self, choice: Choice, events: list[Event]) -> Delta:
        delta, calls = Delta(), list[ToolCall]()
        text, reasoning = join(events)
        for event in events:
            if isinstance(event, Call):
                self._calls[choice.index] = index = self._calls.get(choice.index, -1) + 1
                calls.append(ToolCall(FunctionDelta(name=event.name), index, call_id(choice, event), "function"))
            elif isinstance(event, Arguments):
                index = self._calls[choice.index]
                if not calls or calls[-1].index != index:
                    calls.append(ToolCall(FunctionDelta(), index))
                calls[-1].function.arguments += event.text
        delta.content = text or UNSET
        delta.reasoning_content = delta.reasoning = reasoning or UNSET
        delta.tool_calls = calls or UNSET
        return delta

    def whole(self, run: Generation, pieces: list[list[Piece]]) -> Reply:
        choices = []
        for choice, got in zip(run.choices, pieces, strict=True):
            delta = self._delta(choice, [event for piece in got for event in piece.events])
            logprobs = None if choice.params.logprobs is None else self._logprobs(_join(got)[1])
            message = AnswerMessage(delta.content or (None if delta.tool_calls else ""))
            message.reasoning_content, message.reasoning = delta.reasoning_content, delta.reasoning
            message.tool_calls = delta.tool_calls
            for call in delta.tool_calls or ():
                call.index = UNSET
            choices.append(MessageChoice(choice.index, message, logprobs, choice.finish or "stop"))
        return self._reply(run, choices)

    def _logprobs(self, entries: list[tuple[int, TokenLogProbs]]) -> ChatLogProbs:
        out = []
        for token, entry in entries:
            top = [TopLogProb(*self._token(t, value)) for t, value in entry.top]
            out.append(ChatLogProb(*self._token(token, entry.logprob), top))
        return ChatLogProbs(out)

    def _token(self, token: int, logprob: float) -> tuple[str, float, list[int]]:
        raw = self._tokenizer.token_bytes(token)
        return raw.decode("utf-8", "replace"), max(logprob, LEAST), list(raw)


class CompletionForm(OpenAIForm):
    prefix, kind, kind_chunk = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, model: str, tokenizer: Tokens, include_usage: bool, each: bool, n: int, best_of: int, logprobs: bool
    ) -> None:
        super().__init__(model, tokenizer, include_usage, each)
        self._n, self._best_of, self._shown = n, best_of, logprobs

    def piece(self, choice: Choice, piece: Piece) -> Reply | None:
        if not piece.text and not piece.entries and piece.finish is None:
            return None
        logprobs = self._logprobs(choice, piece.entries) if piece.entries else None
        return self._chunk(choice, [TextChoice(choice.index, piece.text, logprobs, piece.finish)])

    def whole(self, run: Generation, pieces: list[list[Piece]]) -> Reply:
        choices: list[TextChoice] = []
        for choice, got in self._best(list(zip(run.choices, pieces, strict=True))):
            text, entries = _join(got)
            logprobs = self._logprobs(choice, entries) if self._shown else None
            choices.append(TextChoice(len(choices), text, logprobs, choice.finish))
        return self._reply(run, choices)

    def _best(self, choices: list[tuple[Choice, list[Piece]]]) -> list[tuple[Choice, list[Piece]]]:
        """Of each prompt's best_of, the n whose tokens have the highest mean log-probability, the best one first."""
        if self._best_of == self._n:
            return choices
        groups = [choices[i : i + self._best_of] for i in range(0, len(choices), self._best_of)]
        return [pair for group in groups for pair in sorted(group, key=_mean_logprob, reverse=True)[: self._n]]

    def _logprobs(self, choice: Choice, entries: list[tuple[int, TokenLogProbs]]) -> CompletionLogProbs:
        out = CompletionLogProbs([], [], [] if choice.params.logprobs else None, [])
        for token, entry in entries:
            text = self._token(token)
            out.tokens.append(text)
            first = math.isnan(entry.logprob)  # of an echoed prompt
            out.token_logprobs.append(None if first else max(entry.logprob, LEAST))
            out.text_offset.append(choice.shown)
            choice.shown += len(text)
            if out.top_logprobs is not None and first:
                out.top_logprobs.append(None)
            elif out.top_logprobs is not None:
                top = {self._token(t): max(value, LEAST) for t, value in entry.top}
                out.top_logprobs.append(top | {text: max(entry.logprob, LEAST)})
        return out

    def _token(self, token: int) -> str:
        """Its text, or `bytes:\\xf0\\x9f` where it is only part of a character."""
        raw = self._tokenizer.token_bytes(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class GenerateForm(Form):
    """Token ids out. A stream is one event per step; the last one has the finish reason and the counts, the first one
    the logprobs of the prompt, which are to be set before it, if anybody wants them."""

    prompt_logprobs: list[TokenLogProbs | None] | msgspec.UnsetType = msgspec.UNSET

    def piece(self, choice: Choice, piece: Piece) -> Generated:
        return self._body(choice, [piece])

    def whole(self, run: Generation, pieces: list[list[Piece]]) -> Generated:
        return self._body(run.choices[0], pieces[0])

    def last(self, run: Generation) -> None:
        return None

    def _body(self, choice: Choice, pieces: list[Piece]) -> Generated:
        tokens = [token for p in pieces for token in p.tokens]
        logprobs = None
        if choice.params.logprobs is not None:
            logprobs = [
                TokenLogProbs(max(e.logprob, LEAST), [(t, max(v, LEAST)) for t, v in e.top])
                for _, e in _join(pieces)[1]
            ]
        finish = pieces[-1].finish
        counts = usage(len(choice.prompt), choice.output_tokens, choice.cached_tokens) if finish is not None else None
        before, self.prompt_logprobs = self.prompt_logprobs, msgspec.UNSET
        return Generated(choice.rid, tokens, logprobs, finish, counts, before)


def _mean_logprob(pair: tuple[Choice, list[Piece]]) -> float:
    values = [entry.logprob for _, entry in _join(pair[1])[1] if not math.isnan(entry.logprob)]
    return sum(values) / len(values) if values else 0.0


def join(events: list[Event]) -> tuple[str, str]:
    """All the text, and all the reasoning."""
    kinds = (Text, Reasoning)
    text, reasoning = ("".join(e.text for e in events if isinstance(e, kind)) for kind in kinds)
    return text, reasoning


def call_id(choice: Choice, call: Call) -> str:
    return call.id or (choice.new_id() if choice.new_id else f"call_{uuid.uuid4().hex[:24]}")


def _join(pieces: list[Piece]) -> tuple[str, list[tuple[int, TokenLogProbs]]]:
    return "".join(p.text for p in pieces), [entry for p in pieces for entry in p.entries]
