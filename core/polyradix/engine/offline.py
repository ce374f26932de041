"""`polyradix.Engine`: the same engine in this process, without a server."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import numpy as np

from polyradix.backend.protocol import Backend
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore
from polyradix.engine.detokenizer import Detokenizer
from polyradix.engine.messages import Chunk, FinishReason, Read, TokenLogProbs
from polyradix.engine.tokenizer import load_tokenizer
from polyradix.graph.checkpoint import open_checkpoint
from polyradix.schedule.params import SamplingParams

Prompt = str | Sequence[int]


@dataclass
class Completion:
    """One finished request. `tokens` holds every sampled id, also the one that stopped it; `text` does not."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: FinishReason | None = None
    logprobs: list[TokenLogProbs] = field(default_factory=list)
    error: str = ""


@dataclass
class Piece:
    """What a step added to a completion: see there."""

    text: str
    tokens: list[int]
    finish: FinishReason | None
    cached_tokens: int


class _Run:
    """A request under way, and its pieces that nobody has taken yet."""

    def __init__(self, rid: str, prompt_tokens: int, text: Detokenizer) -> None:
        self.rid, self._text = rid, text
        self.completion = Completion(prompt_tokens=prompt_tokens)
        self.pieces: deque[Piece] = deque()

    def take(self, chunk: Chunk) -> None:
        """Chunks after the last one, of a request that a stop string ended, must not come here."""
        done = self.completion
        done.cached_tokens = chunk.cached_tokens
        done.error = chunk.error
        text, used = self._text.take(chunk.tokens if chunk.stop_token is None else chunk.tokens[:-1])
        tokens = chunk.tokens[:used] if self._text.stopped else chunk.tokens
        done.tokens += tokens
        done.logprobs += (chunk.logprobs or [])[: len(tokens)]
        if chunk.finish is not None and not self._text.stopped:
            text += self._text.finish()
        done.text += text
        done.finish = "stop" if self._text.stopped else chunk.finish
        self.pieces.append(Piece(text, tokens, done.finish, done.cached_tokens))


class Engine:
    """Loads a model and generates. Options are EngineConfig's; raises the errors of EngineCore.

    Everything may be mixed: whoever waits drives the engine, a step at a time, for all requests. Not thread-safe. The
    async methods block their event loop for as long as a step takes.

    Example: `Engine("demo").generate("Once upon a time", max_tokens=32)[0].text`.
    """

    def __init__(self, model: str, *, backend: Backend | None = None, **options: Any) -> None:
        config = EngineConfig(model=model, **options)
        checkpoint = open_checkpoint(model, load_format=config.load_format, revision=config.revision)
        self.tokenizer = load_tokenizer(checkpoint)
        self.core = EngineCore(config, backend, checkpoint)
        self._runs: dict[str, _Run] = {}
        self._vectors: dict[str, Chunk | None] = {}

    def chat(self, messages: list[dict[str, Any]], *, stop: Sequence[str] = (), **params: Any) -> Completion:
        """The assistant's next turn, from the model's chat template."""
        tokens = self.tokenizer.encode(self.tokenizer.chat_prompt(messages), add_special=False)
        return self.generate([tokens], stop=stop, **params)[0]

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, stop: Sequence[str] = (), **params: Any
    ) -> list[Completion]:
        """Completes all prompts together, in order. `params` are SamplingParams' fields; `stop` ends a completion
        before the first of these strings. Raises InvalidParam; if one prompt is refused, none is run."""
        runs = self._submit(_as_list(prompts), stop, params)
        try:
            while self._open(runs):
                self._step()
        finally:
            self._end(runs)
        return [run.completion for run in runs]

    async def async_generate(
        self, prompts: Prompt | Sequence[Prompt], *, stop: Sequence[str] = (), **params: Any
    ) -> list[Completion]:
        """As generate, together with what other tasks have submitted."""
        runs = self._submit(_as_list(prompts), stop, params)
        try:
            while self._open(runs):
                self._step()
                await asyncio.sleep(0)
        finally:
            self._end(runs)
        return [run.completion for run in runs]

    def stream(self, prompt: Prompt, *, stop: Sequence[str] = (), **params: Any) -> Iterator[Piece]:
        """As generate, for one prompt and piece by piece; the last one has `finish`. Closing it ends the request."""
        (run,) = runs = self._submit([prompt], stop, params)
        try:
            while run.pieces or self._open(runs):
                if run.pieces:
                    yield run.pieces.popleft()
                else:
                    self._step()
        finally:
            self._end(runs)

    async def async_stream(self, prompt: Prompt, *, stop: Sequence[str] = (), **params: Any) -> AsyncIterator[Piece]:
        """As stream, together with what other tasks have submitted."""
        (run,) = runs = self._submit([prompt], stop, params)
        try:
            while run.pieces or self._open(runs):
                if run.pieces:
                    yield run.pieces.popleft()
                else:
                    self._step()
                    await asyncio.sleep(0)
        finally:
            self._end(runs)

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: Literal["last", "mean"] = "last") -> list[np.ndarray]:
        """Vectors float32 [hidden] of length 1, if the engine has `embeddings`. Raises InvalidParam, RuntimeError."""
        reads = [Read(uuid.uuid4().hex, self._tokens(p).astype("<i4").tobytes(), pooling) for p in _as_list(prompts)]
        try:
            for read in reads:
                self.core.read(read)
                self._vectors[read.rid] = None
            while any(self._vectors[read.rid] is None for read in reads):
                self._step()
        finally:
            found = [self._vectors.pop(read.rid, None) for read in reads]
            for read in reads:
                self.core.abort(read.rid)
            self._drain()
        chunks = [chunk for chunk in found if chunk is not None]
        if errors := [chunk.error for chunk in chunks if chunk.error]:
            raise RuntimeError(errors[0])
        return [np.frombuffer(chunk.embedding, "<f4").copy() for chunk in chunks]

    def _tokens(self, prompt: Prompt) -> np.ndarray:
        return np.array(self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt, np.int32)

    def _submit(self, prompts: list[Prompt], stop: Sequence[str], params: dict[str, Any]) -> list[_Run]:
        sampling = msgspec.convert(params, SamplingParams, strict=False)
        if not sampling.ignore_eos:
            stops = tuple({*sampling.stop_token_ids, *self.tokenizer.eos_ids})
            sampling = msgspec.structs.replace(sampling, stop_token_ids=stops)
        runs: list[_Run] = []
        try:
            for prompt in prompts:
                tokens = self._tokens(prompt)
                run = _Run(uuid.uuid4().hex, len(tokens), Detokenizer(self.tokenizer, stop))
                self.core.submit(run.rid, tokens, sampling)
                self._runs[run.rid] = run
                runs.append(run)
        except BaseException:
            self._end(runs)
            raise
        return runs

    def _open(self, runs: list[_Run]) -> bool:
        return self.core.has_work and any(run.completion.finish is None for run in runs)

    def _step(self) -> None:
        for chunk in self.core.step():
            if chunk.rid in self._vectors:
                self._vectors[chunk.rid] = chunk
            elif (run := self._runs.get(chunk.rid)) is not None:
                run.take(chunk)
                if run.completion.finish is not None:
                    self._end([run])

    def _end(self, runs: list[_Run]) -> None:
        """Forgets them; what still runs is aborted."""
        for run in runs:
            if self._runs.pop(run.rid, None) is not None:
                self.core.abort(run.rid)
        self._drain()

    def _drain(self) -> None:
        """Once nobody waits, takes the steps that are still in flight, which hold pages."""
        while not self._runs and not self._vectors and self.core.has_work and not self.core.lost:
            self.core.step()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
