"""One HTTP request while it runs: engine chunks in, pieces of text out. Knows no HTTP and no JSON."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from polyradix.engine.detokenizer import Detokenizer
from polyradix.engine.messages import Chunk, Submit, TokenLogProbs
from polyradix.grammar.spec import Vocabulary
from polyradix.schedule.params import SamplingParams
from polyradix.serve import tracing
from polyradix.serve.access import CALLER
from polyradix.serve.client import EngineClient, EngineDead
from polyradix.serve.errors import ApiError
from polyradix.serve.metrics import Metrics
from polyradix.serve.parsers.base import Parser
from polyradix.serve.parsers.feed import Event, Text
from polyradix.serve.replies import Finish
from polyradix.serve.terms import Terms

FAILURES = ("error", "abort")
RETRY_SECONDS = 1  # what a client is told that found the queue full


class Tokens(Vocabulary, Protocol):
    """What the server needs of a tokenizer; `Tokenizer` of the engine has it."""

    @property
    def template(self) -> str: ...
    @property
    def longest(self) -> int: ...  # bytes of a token
    def chat_prompt(self, messages: list[dict[str, Any]], **kwargs: Any) -> str: ...


@dataclass
class Piece:
    """What one step added to a choice. `entries` are tokens whose text is out, with logprobs if asked for. `events` are
    what a parser made of the text; without one, the text."""

    text: str
    tokens: list[int]
    entries: list[tuple[int, TokenLogProbs]]
    finish: Finish | None
    events: list[Event]


@dataclass
class Choice:
    """One completion. `shown` counts characters of logprob entries given out so far (for text_offset).

    `echo` is given out before everything else. With `silent` nothing generated is: the engine has to generate a token.
    """

    index: int
    prompt: list[int]
    params: SamplingParams
    tokenizer: Tokens
    stop: Sequence[str] = ()
    show_stop: bool = False
    show_special: bool = False
    terms: Terms = field(default_factory=Terms)
    rid: str = field(default_factory=lambda: uuid.uuid4().hex)
    output_tokens: int = 0
    reasoning_tokens: int = 0  # of the output's
    cached_tokens: int = 0
    queue_seconds: float = 0.0
    finish: Finish | None = None
    shown: int = 0
    echo: str = ""
    silent: bool = False
    parser: Parser | None = None
    new_id: Callable[[], str] | None = None  # of a tool call

    def __post_init__(self) -> None:
        self._detokenizer = Detokenizer(self.tokenizer, self.stop, not self.show_special, self.show_stop)
        self._held: list[tuple[int, int, TokenLogProbs]] = []  # (start byte, token, its logprobs)
        self._token_bytes = 0
        self._text_bytes = 0
        self._echoed: list[tuple[int, TokenLogProbs]] = []  # of the prompt, not given out yet

    def submit(self) -> Submit:
        t, tokens = self.terms, np.asarray(self.prompt, "<i4").tobytes()
        tenant = CALLER.get().name or t.tenant
        return Submit(self.rid, tokens, self.params, t.namespace, t.priority, t.timeout, tenant)

    def echo_logprobs(self, found: list[TokenLogProbs | None]) -> None:
        """Of the prompt's tokens, to come before everything else. The first one has none: NaN."""
        self._echoed = list(zip(self.prompt, (each or TokenLogProbs(math.nan, []) for each in found), strict=True))

    def push(self, chunk: Chunk) -> Piece:
        """Raises ApiError if the engine gave up on it."""
        if chunk.finish in FAILURES:
            raise engine_error(chunk)
        entries, self._echoed = self._echoed, []
        if self.silent:
            chunk.tokens, chunk.logprobs, chunk.stop_token = [], None, None
        self.queue_seconds = chunk.queue_seconds
        self.cached_tokens = max(self.cached_tokens, chunk.cached_tokens)
        visible = chunk.tokens if chunk.stop_token is None else chunk.tokens[:-1]
        text, used, events = self._take(visible)
        if self._ended:
            visible = chunk.tokens = chunk.tokens[:used]
        self.output_tokens += len(chunk.tokens)
        rest = self._detokenizer.finish() if chunk.finish is not None and not self._ended else ""
        text += rest
        if self._ended:
            self.finish = "stop"
        elif chunk.finish == "stop" or chunk.finish == "length":
            self.finish = "length" if self.silent else chunk.finish
        entries += self._entries(visible, chunk.logprobs or [], text)
        if self.parser is None:
            text, self.echo = self.echo + text, ""
            events = [Text(text)] if text else []
        elif self.finish is not None:
            events += self.parser.push(rest) + self.parser.finish()
            if self.finish == "stop" and self.parser.calls:
                self.finish = "tool_calls"
        return Piece(text, chunk.tokens, entries, self.finish, events)

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended it."""
        return self._detokenizer.stop

    @property
    def _ended(self) -> bool:
        """By a stop string, or because nothing more is wanted of it."""
        return self._detokenizer.stopped or (self.parser is not None and self.parser.done)

    def _take(self, tokens: list[int]) -> tuple[str, int, list[Event]]:
        """Their text, how many of them came before the end, and what a parser makes of them. It reads one at a time, so
        that what counts as reasoning does not depend on how many come together."""
        if self.parser is None:
            return *self._detokenizer.take(tokens), []
        text, events = "", list[Event]()
        for used, token in enumerate(tokens, 1):
            part = self._detokenizer.push([token])
            text += part
            events += self.parser.push(part)
            self.reasoning_tokens += self.parser.reasoning
            if self._ended:
                return text, used, events
        return text, len(tokens), events

    def _entries(self, tokens: list[int], logprobs: list[TokenLogProbs], text: str) -> list[tuple[int, TokenLogProbs]]:
        """Logprobs whose text is out: while a stop string may be starting, they wait with the text; if it was one, they
        are dropped with it."""
        for token, logprob in zip(tokens, logprobs, strict=False):
            self._held.append((self._token_bytes, token, logprob))
            if self.show_special or token not in self.tokenizer.special_ids:
                self._token_bytes += len(self.tokenizer.token_bytes(token))
        self._text_bytes += len(text.encode())
        everything = not self.stop or (self.finish is not None and not self._detokenizer.stopped)
        out = [h for h in self._held if everything or h[0] < self._text_bytes]
        self._held = self._held[len(out) :]
        return [(token, logprob) for _, token, logprob in out]


class Counts(NamedTuple):
    """Tokens. Of `prompt`, `cached` were; of `output`, `reasoning` were."""

    prompt: int
    output: int
    cached: int
    reasoning: int


class Generation:
    """All choices of one request. A context manager: entering submits them, leaving aborts what still runs."""

    def __init__(self, client: EngineClient, metrics: Metrics, choices: Sequence[Choice], started: float) -> None:
        self.choices = choices
        self._metrics = metrics
        self._by_rid = {choice.rid: choice for choice in choices}
        self._call = client.call([choice.submit() for choice in choices])
        self._started = started
        self._last: dict[str, float] = {}
        self._unfinished = "abort"
        self._caller = CALLER.get()
        self._first_token: float | None = None
        self._failure: ApiError | None = None  # to be raised once the pieces before it are given out

    def __enter__(self) -> Generation:
        try:
            self._call.__enter__()
        except EngineDead as error:
            raise dead(error) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._call.__exit__()
        took = time.monotonic() - self._started
        prompt, output, cached, _reasoning = self.counts()
        self._caller.charge(prompt + output)
        self._trace(took, prompt, output, cached)
        for choice in self.choices:
            self._metrics.finished(choice.finish or self._unfinished, took)

    def _trace(self, took: float, prompt: int, output: int, cached: int) -> None:
        first = self.choices[0]
        attributes: dict[str, Any] = {
            "gen_ai.request.id": first.rid,
            "gen_ai.request.max_tokens": first.params.max_tokens,
            "gen_ai.request.temperature": first.params.temperature,
            "gen_ai.usage.input_tokens": prompt,
            "gen_ai.usage.output_tokens": output,
            "gen_ai.response.finish_reasons": [choice.finish or self._unfinished for choice in self.choices],
            "polyradix.queue_seconds": first.queue_seconds,
            "polyradix.cached_tokens": cached,
            "polyradix.tenant": self._caller.name,
        }
        if (token := self._first_token) is not None:
            attributes["gen_ai.server.time_to_first_token"] = token
        tracing.span("generate", took, self._caller.headers, attributes)

    async def next(self) -> list[tuple[Choice, Piece]]:
        """What is new, at least one piece; empty at the end. Raises ApiError when the engine refuses, fails or dies."""
        try:
            return await self._next()
        except EngineDead as error:
            self._unfinished = "error"
            raise dead(error) from None
        except ApiError:
            self._unfinished = "error"
            raise

    async def _next(self) -> list[tuple[Choice, Piece]]:
        if self._failure is not None:
            raise self._failure
        chunks = await self._call.next()
        pieces: list[tuple[Choice, Piece]] = []
        for chunk in _merge(chunks):
            choice = self._by_rid[chunk.rid]
            if choice.finish is None:
                try:
                    piece = choice.push(chunk)
                except ApiError as error:
                    self._failure = error
                    break
                if piece.finish is not None and chunk.finish is None:
                    self._call.drop(choice.rid)
                self._observe(choice, len(piece.tokens))
                pieces.append((choice, piece))
        return pieces or (await self._next() if chunks else [])

    def _observe(self, choice: Choice, tokens: int) -> None:
        now = time.monotonic()
        last = self._last.get(choice.rid)
        if last is None:
            self._metrics.first_token.observe(now - self._started)
            self._first_token = self._first_token or now - self._started
            self._metrics.queue.observe(choice.queue_seconds)
        else:
            for _ in range(tokens):
                self._metrics.inter_token.observe((now - last) / tokens)
        self._last[choice.rid] = now

    def counts(self) -> Counts:
        """A prompt of n choices counts once."""
        prompts = {id(choice.prompt): choice for choice in reversed(self.choices)}.values()
        return Counts(
            sum(len(c.prompt) for c in prompts),
            sum(c.output_tokens for c in self.choices),
            sum(c.cached_tokens for c in prompts),
            sum(c.reasoning_tokens for c in self.choices),
        )


def _merge(chunks: list[Chunk]) -> list[Chunk]:
    """One chunk a request: a client that reads slowly gets more at a time. Chunks of one request are in order. What
    ends one without success comes last, on its own."""
    merged: dict[str, Chunk] = {}
    failed = [chunk for chunk in chunks if chunk.finish in FAILURES]
    for chunk in chunks:
        if chunk.finish in FAILURES:
            continue
        before = merged.get(chunk.rid)
        if before is not None:
            chunk.tokens = before.tokens + chunk.tokens
            if before.logprobs is not None or chunk.logprobs is not None:
                chunk.logprobs = (before.logprobs or []) + (chunk.logprobs or [])
            chunk.cached_tokens = max(before.cached_tokens, chunk.cached_tokens)
        merged[chunk.rid] = chunk
    return [*merged.values(), *failed]


def dead(error: EngineDead) -> ApiError:
    return ApiError(503, str(error), code="engine_unavailable")


def engine_error(chunk: Chunk) -> ApiError:
    if chunk.param:
        return ApiError(400, chunk.error, chunk.param)
    if chunk.code == "queue_full":
        return ApiError(503, chunk.error, code=chunk.code, headers={"retry-after": str(RETRY_SECONDS)})
    if chunk.code == "timeout":  # a second try would take as long
        return ApiError(408, chunk.error, code=chunk.code, headers={"x-should-retry": "false"})
    if chunk.finish == "abort":
        return ApiError(503, chunk.error or "the request was aborted", code="aborted")
    return ApiError(500, chunk.error or "the engine failed on this request", code="engine_error")
