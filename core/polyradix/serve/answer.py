"""How a generation is answered: one JSON body, or server-sent events. Both end at once when the client hangs up."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from polyradix.engine.messages import TokenLogProbs
from polyradix.serve.errors import ApiError
from polyradix.serve.generation import Choice, Generation, Piece, Tokens
from polyradix.serve.replies import (
    AnswerMessage,
    ChatLogProb,
    ChatLogProbs,
    CompletionLogProbs,
    Delta,
    DeltaChoice,
    Generated,
    MessageChoice,
    Reply,
    TextChoice,
    TopLogProb,
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
    """The shape of an answer: `piece` is one stream event (None: nothing to say), and `whole` the full body."""

    def piece(self, choice: Choice, piece: Piece) -> msgspec.Struct | None: ...
    def whole(self, run: Generation, pieces: list[list[Piece]]) -> msgspec.Struct: ...
    def last(self, run: Generation) -> msgspec.Struct | None: ...  # the stream's closing event


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


async def send_json(send: Send, value: msgspec.Struct) -> None:
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
                events = [_event(e) for choice, piece in pieces if (e := form.piece(choice, piece)) is not None]
                if events:
                    await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
                pieces = await run.next()
            last = form.last(run)
            end = (b"" if last is None else _event(last)) + b"data: [DONE]\n\n"
        except ApiError as error:
            end = b"data: " + error.body() + b"\n\n"
    await send({"type": "http.response.body", "body": end})


def _event(value: msgspec.Struct) -> bytes:
    return b"data: " + _encode(value) + b"\n\n"


class OpenAIForm:
    """What chat and completion answers share."""

    prefix: str
    kind: str
    kind_chunk: str

    def __init__(self, model: str, tokenizer: Tokens, include_usage: bool) -> None:
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._tokenizer = tokenizer
        self._usage = include_usage

    def _chunk(self, choices: list[DeltaChoice] | list[TextChoice]) -> Reply:
        no_usage = None if self._usage else msgspec.UNSET
        return Reply(self._id, self.kind_chunk, self._created, self._model, choices, no_usage)

    def _reply(self, run: Generation, choices: list[MessageChoice] | list[TextChoice]) -> Reply:
        return Reply(self._id, self.kind, self._created, self._model, choices, usage(*run.counts()))

    def last(self, run: Generation) -> Reply | None:
        if not self._usage:
            return None
        nothing: list[TextChoice] = []
        return Reply(self._id, self.kind_chunk, self._created, self._model, nothing, usage(*run.counts()))


class ChatForm(OpenAIForm):
    prefix, kind, kind_chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Tokens, include_usage: bool) -> None:
        super().__init__(model, tokenizer, include_usage)
        self._begun: set[int] = set()

    def piece(self, choice: Choice, piece: Piece) -> Reply | None:
        delta = Delta()
        if choice.index not in self._begun:
            self._begun.add(choice.index)
            delta.role, delta.content = "assistant", piece.text
        elif piece.text:
            delta.content = piece.text
        elif not piece.entries and piece.finish is None:
            return None
        logprobs = self._logprobs(piece.entries) if piece.entries else None
        return self._chunk([DeltaChoice(choice.index, delta, logprobs, piece.finish)])

    def whole(self, run: Generation, pieces: list[list[Piece]]) -> Reply:
        choices = []
        for choice, got in zip(run.choices, pieces, strict=True):
            text, entries = _join(got)
            logprobs = None if choice.params.logprobs is None else self._logprobs(entries)
            choices.append(MessageChoice(choice.index, AnswerMessage(text), logprobs, choice.finish or "stop"))
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

    def piece(self, choice: Choice, piece: Piece) -> Reply | None:
        if not piece.text and not piece.entries and piece.finish is None:
            return None
        logprobs = self._logprobs(choice, piece.entries) if piece.entries else None
        return self._chunk([TextChoice(choice.index, piece.text, logprobs, piece.finish)])

    def whole(self, run: Generation, pieces: list[list[Piece]]) -> Reply:
        choices = []
        for choice, got in zip(run.choices, pieces, strict=True):
            text, entries = _join(got)
            logprobs = None if choice.params.logprobs is None else self._logprobs(choice, entries)
            choices.append(TextChoice(choice.index, text, logprobs, choice.finish))
        return self._reply(run, choices)

    def _logprobs(self, choice: Choice, entries: list[tuple[int, TokenLogProbs]]) -> CompletionLogProbs:
        out = CompletionLogProbs([], [], [] if choice.params.logprobs else None, [])
        for token, entry in entries:
            text = self._token(token)
            out.tokens.append(text)
            out.token_logprobs.append(max(entry.logprob, LEAST))
            out.text_offset.append(choice.shown)
            choice.shown += len(text)
            if out.top_logprobs is not None:
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


class GenerateForm:
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


def _join(pieces: list[Piece]) -> tuple[str, list[tuple[int, TokenLogProbs]]]:
    return "".join(p.text for p in pieces), [entry for p in pieces for entry in p.entries]
