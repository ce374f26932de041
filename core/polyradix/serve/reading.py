"""/v1/embeddings, and the logprobs of a prompt: what a forward pass alone can answer."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from starlette.types import Send

from polyradix.engine.messages import Chunk, Read, TokenLogProbs
from polyradix.serve.access import CALLER
from polyradix.serve.answer import LEAST, Answer, send_json
from polyradix.serve.client import EngineClient, EngineDead
from polyradix.serve.errors import ApiError, field_error
from polyradix.serve.generation import FAILURES, dead, engine_error
from polyradix.serve.openai import Body, check_model, prompts

if TYPE_CHECKING:
    from polyradix.serve.app import Server

MAX_INPUTS = 2048
Want = Literal["last", "mean", "logprobs"]


class EmbeddingRequest(Body):
    input: str | list[str] | list[int] | list[list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None  # so many from the end, -1: what fits


class Embedding(msgspec.Struct):
    index: int
    embedding: list[float] | str
    object: str = "embedding"


class EmbeddingUsage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class Embeddings(msgspec.Struct):
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage
    object: str = "list"


async def embeddings(server: Server, body: EmbeddingRequest, started: float) -> Answer:
    """Vectors of length 1, float32; as base64 they are little-endian."""
    check_model(body.model, server.name)
    pooling = server.pooling
    if pooling is None:
        raise ApiError(400, "this server gives no embeddings; start it with --embeddings last or mean")
    if body.dimensions is not None:
        raise field_error("dimensions", body.dimensions, "nothing: this model's vectors have one size")
    inputs = prompts(body.input, "input")
    if len(inputs) > MAX_INPUTS:
        raise field_error("input", f"{len(inputs)} inputs", f"at most {MAX_INPUTS}")
    given = [await server.tokens(prompt, "input", body.truncate_prompt_tokens) for prompt in inputs]
    for prompt in given:
        server.check_length(prompt, "input", output=0)

    async def work(send: Send) -> None:
        chunks = await read(server.client, given, pooling)
        data = [Embedding(i, _vector(c.embedding, body.encoding_format)) for i, c in enumerate(chunks)]
        tokens = sum(map(len, given))
        await send_json(send, Embeddings(data, server.name, EmbeddingUsage(tokens, tokens)))

    return Answer(work)


def _vector(raw: bytes, form: str | None) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(raw).decode()
    return [float(x) for x in np.frombuffer(raw, "<f4")]


async def prompt_logprobs(
    client: EngineClient, given: Sequence[list[int]], top: int
) -> list[list[TokenLogProbs | None]]:
    """Of each prompt's tokens, None for the first."""
    chunks = await read(client, given, "logprobs", top)
    return [[None, *map(_bounded, chunk.logprobs or [])] for chunk in chunks]


def _bounded(e: TokenLogProbs) -> TokenLogProbs:
    return TokenLogProbs(max(e.logprob, LEAST), [(token, max(value, LEAST)) for token, value in e.top])


async def read(client: EngineClient, given: Sequence[list[int]], want: Want, top: int = 0) -> list[Chunk]:
    """The answers, in order. Raises ApiError when the engine refuses, fails or dies."""
    reads = [Read(uuid.uuid4().hex, np.asarray(tokens, "<i4").tobytes(), want, top) for tokens in given]
    got: dict[str, Chunk] = {}
    try:
        with client.call(reads) as call:
            while chunks := await call.next():
                for chunk in chunks:
                    if chunk.finish in FAILURES:
                        raise engine_error(chunk)
                    got[chunk.rid] = chunk
    except EngineDead as error:
        raise dead(error) from None
    CALLER.get().charge(sum(map(len, given)))
    return [got[r.rid] for r in reads]
