"""/tokenize and /detokenize, in vLLM's shapes, and /health_generate."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
from pydantic import Field
from starlette.responses import Response

from polyradix.engine.messages import Submit
from polyradix.schedule.params import SamplingParams
from polyradix.serve import openai
from polyradix.serve.client import EngineDead
from polyradix.serve.errors import ApiError, field_error
from polyradix.serve.generation import FAILURES, dead, engine_error

if TYPE_CHECKING:
    from polyradix.serve.app import Server

HEALTH_SECONDS = 20.0
CHAT_FIELDS = ("messages", "add_generation_prompt", "continue_final_message", "chat_template_kwargs", "tools")


class TokenizeRequest(openai.Body):
    """`prompt`, or `messages` for the chat template."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[openai.Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None  # true for a prompt, false for messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[openai.Tool] | None = None
    return_token_strs: bool = False


class DetokenizeRequest(openai.Body):
    tokens: list[int]
    model: str | None = None


async def tokenize(server: Server, body: TokenizeRequest, started: float) -> Response:
    openai.check_model(body.model, server.name)
    if (body.prompt is None) == (body.messages is None):
        raise field_error("prompt", body.prompt, "a text, or messages in its place")
    text, special = body.prompt, body.add_special_tokens
    if text is None:
        given = {name: getattr(body, name) for name in CHAT_FIELDS}
        _, text = await server.chat_text(openai.ChatRequest.model_construct(**given))
    ids = await server.encode(text, add_special=body.messages is None if special is None else special)
    strings = [server.text([t]) for t in ids] if body.return_token_strs else None
    return json({"count": len(ids), "max_model_len": server.context, "tokens": ids, "token_strs": strings})


async def detokenize(server: Server, body: DetokenizeRequest, started: float) -> Response:
    openai.check_model(body.model, server.name)
    return json({"prompt": server.text(server.check_ids(body.tokens, "tokens"))})


async def health_generate(server: Server) -> Response:
    """Generates one token. ApiError 503 if that takes too long."""
    context = server.context
    params = SamplingParams(max_tokens=1, temperature=0)
    submit = Submit(uuid.uuid4().hex, np.zeros(1, "<i4").tobytes(), params)
    try:
        with server.client.call([submit]) as call:
            chunks = await asyncio.wait_for(call.next(), HEALTH_SECONDS)
    except EngineDead as error:
        raise dead(error) from None
    except TimeoutError:
        message = f"no token within {HEALTH_SECONDS:g} s"
        raise ApiError(503, message, code="engine_unavailable") from None
    if chunks[0].finish in FAILURES:
        raise engine_error(chunks[0])
    return json({"status": "ok", "max_context": context})


def json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
