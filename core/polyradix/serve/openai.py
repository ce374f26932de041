"""What clients may send: OpenAI's request bodies and the native one, and what they mean for the engine.

A field of OpenAI's that is not done yet is refused when it is set to anything but its default; it is never ignored in
silence. Fields nobody knows are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polyradix.schedule.params import InvalidParam, SamplingParams
from polyradix.serve.errors import ApiError, field_error, show
from polyradix.serve.structured import grammar

MAX_CHOICES = 1024  # prompts times n, in one request
MAX_STOPS = 4


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Sampling(Body):
    """What all three kinds of request share. None is the default everywhere."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None


class StreamOptions(Body):
    include_usage: bool | None = None


class OpenAIBody(Sampling):
    model: str | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None


class Part(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part]
    name: str | None = None


class ChatRequest(OpenAIBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(OpenAIBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None


class GenerateRequest(Sampling):
    """The native route: token ids in, token ids out."""

    input_ids: list[int]
    logprobs: int | None = None
    prompt_logprobs: int | None = None  # so many alternatives of every prompt token but the first


# Fields that are not done, with the values that ask for nothing.
_PENALTIES: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_tokens": (0,),
}
REFUSED_CHAT: Mapping[str, tuple[object, ...]] = _PENALTIES | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "store": (False,),
}
REFUSED_COMPLETION: Mapping[str, tuple[object, ...]] = _PENALTIES | {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
}
REFUSED_MESSAGE: Mapping[str, tuple[object, ...]] = {
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
}


def refuse(body: Body, refused: Mapping[str, tuple[object, ...]], where: str = "") -> None:
    """ApiError 400 for the first field that is set and not supported."""
    for name, value in (body.model_extra or {}).items():
        if name in refused and value is not None and value not in refused[name]:
            field = where + name
            raise ApiError(400, f"{field} is not supported by this server (got {show(value)})", field)


def check_model(model: str | None, served: str) -> None:
    if model is not None and model != served:
        message = f"the model {show(model)} does not exist; this server has {served!r}"
        raise ApiError(404, message, "model", "model_not_found")


def check_common(body: OpenAIBody, served: str) -> None:
    """The model's name, n, and the shape of stop and stream_options."""
    check_model(body.model, served)
    if body.n is not None and not 1 <= body.n <= 128:
        raise field_error("n", body.n, "an integer from 1 to 128")
    if body.stream_options is not None and not body.stream:
        raise field_error("stream_options", body.stream_options.model_dump(), "nothing unless stream is true")


def stops(body: OpenAIBody) -> tuple[str, ...]:
    found = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    if len(found) > MAX_STOPS or "" in found:
        raise field_error("stop", body.stop, f"a string or up to {MAX_STOPS}, none of them empty")
    return found


def chat_messages(body: ChatRequest) -> list[dict[str, Any]]:
    """For the chat template: text only, `developer` is what `system` is called in newer models."""
    out: list[dict[str, Any]] = []
    for i, message in enumerate(body.messages):
        refuse(message, REFUSED_MESSAGE, f"messages[{i}].")
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        role = "system" if message.role == "developer" else message.role
        out.append({"role": role, "content": text} | ({"name": message.name} if message.name else {}))
    return out


def chat_logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs is None:
        return 0 if body.logprobs else None
    if not body.logprobs:
        raise field_error("top_logprobs", body.top_logprobs, "nothing unless logprobs is true")
    if not 0 <= body.top_logprobs <= 20:
        raise field_error("top_logprobs", body.top_logprobs, "an integer from 0 to 20")
    return body.top_logprobs


def completion_logprobs(body: CompletionRequest) -> int | None:
    if body.logprobs is not None and not 0 <= body.logprobs <= 5:
        raise field_error("logprobs", body.logprobs, "an integer from 0 to 5")
    return body.logprobs


def completion_prompts(body: CompletionRequest) -> list[str] | list[list[int]]:
    return prompts(body.prompt, "prompt")


def prompts(given: str | list[str] | list[int] | list[list[int]], field: str) -> list[str] | list[list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise field_error(field, given, f"at least one {field}")
    if isinstance(given[0], int):
        return [given]
    return given


def sampling(body: Sampling, max_tokens: int, room: int, vocab: int, logprobs: int | None) -> SamplingParams:
    """Checked. `max_tokens` is the default; the engine is never asked for more than the `room` after the prompt."""
    wanted = max_tokens if body.max_tokens is None else body.max_tokens
    ids = tuple(body.stop_token_ids or ())
    for token in ids:
        if not 0 <= token < vocab:
            raise field_error("stop_token_ids", token, f"token ids from 0 to {vocab - 1}")
    given = {
        name: value
        for name in ("temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos")
        if (value := getattr(body, name)) is not None
    }
    spec = grammar(body.response_format, body.structured_outputs)
    most = min(wanted, room)
    params = SamplingParams(max_tokens=most, stop_token_ids=ids, logprobs=logprobs, grammar=spec, **given)
    try:
        params.check()
    except InvalidParam as error:
        raise ApiError(400, str(error), error.param) from None
    return params
