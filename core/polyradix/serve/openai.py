"""What clients may send: OpenAI's request bodies and the native one, and what they mean for the engine.

A field of OpenAI's that is not done yet is refused when it is set to anything but its default; it is never ignored in
silence. Fields nobody knows are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from polyradix.schedule.params import InvalidParam, SamplingParams
from polyradix.serve.errors import ApiError, field_error, show
from polyradix.serve.structured import grammar

MAX_CHOICES = 1024  # prompts times n, in one request
MAX_STOPS = 32
PENALTIES = ("frequency_penalty", "presence_penalty", "repetition_penalty")
GIVEN = ("temperature", "top_p", "top_k", "min_p", "seed", "ignore_eos", "min_tokens", *PENALTIES)  # taken as they are


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Sampling(Body):
    """What all three kinds of request share. None is the default everywhere."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    min_tokens: int | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = None  # so many from the end, -1: what fits
    stream: bool | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    priority: int | None = None
    timeout: float | None = None
    cache_salt: str | None = None
    extra_key: str | list[str] | None = None
    user: str | None = None


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class OpenAIBody(Sampling):
    model: str | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    stream_options: StreamOptions | None = None


class Part(Body):
    type: Literal["text"]
    text: str


class CalledFunction(Body):
    name: str
    arguments: str


class ToolCall(Body):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same


class Function(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class ChatRequest(OpenAIBody):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None


class CompletionRequest(OpenAIBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: int | None = None


# Fields that are not done, with the values that ask for nothing. The first are vLLM's and SGLang's.
REFUSED: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "stop_regex": ([],),
    "lora_path": (),
    "prompt_logprobs": (),  # /generate has them
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
}
REFUSED_CHAT: Mapping[str, tuple[object, ...]] = {
    **REFUSED,
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "best_of": (1,),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "verbosity": ("medium",),
    "store": (False,),
}
REFUSED_COMPLETION: Mapping[str, tuple[object, ...]] = {**REFUSED, "suffix": ("",)}
REFUSED_GENERATE = {name: neutral for name, neutral in REFUSED.items() if name != "prompt_logprobs"}
REFUSED_MESSAGE: Mapping[str, tuple[object, ...]] = {"function_call": (), "audio": ()}


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


def stops(stop: str | list[str] | None) -> tuple[str, ...]:
    found = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(found) > MAX_STOPS or "" in found:
        raise field_error("stop", stop, f"a string or up to {MAX_STOPS}, none of them empty")
    return found


def chat_messages(body: ChatRequest) -> list[dict[str, Any]]:
    """For the chat template: text only, `developer` is what `system` is called in newer models, arguments of calls are
    objects."""
    out: list[dict[str, Any]] = []
    for i, message in enumerate(body.messages):
        refuse(message, REFUSED_MESSAGE, f"messages[{i}].")
        content = message.content
        if content is None and not (message.role == "assistant" and message.tool_calls):
            raise field_error(f"messages[{i}].content", content, "a string, or text parts")
        text = "".join(part.text for part in content) if isinstance(content, list) else content or ""
        role = "system" if message.role == "developer" else message.role
        message.reasoning_content = message.reasoning_content or message.reasoning
        more = {k: v for k in ("name", "tool_call_id", "reasoning_content") if (v := getattr(message, k))}
        out.append({"role": role, "content": text} | more)
        if message.tool_calls:
            field = f"messages[{i}].tool_calls"
            calls = [_call(call, f"{field}[{j}]") for j, call in enumerate(message.tool_calls)]
            out[-1]["tool_calls"] = calls
    return out


def _call(call: ToolCall, field: str) -> dict[str, Any]:
    given = call.function.arguments
    try:
        arguments = json.loads(given or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise field_error(f"{field}.function.arguments", given, "a JSON object as a string")
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def template_variables(body: ChatRequest) -> dict[str, Any]:
    """What the request gives the chat template, besides messages and tools."""
    given = body.chat_template_kwargs or {}
    if taken := {"self", "messages"} & set(given):
        raise field_error("chat_template_kwargs", sorted(taken)[0], "names other than self and messages")
    add, go_on = body.add_generation_prompt, bool(body.continue_final_message)
    if add and go_on:
        raise field_error("continue_final_message", True, "false where add_generation_prompt is true")
    last = body.messages[-1]
    if go_on and not (last.role == "assistant" and last.content):
        raise field_error("continue_final_message", True, "false unless the last message is the assistant's, with text")
    return ({} if add is None and not go_on else {"add_generation_prompt": bool(add)}) | given


def unfinished(text: str, messages: list[dict[str, Any]]) -> str:
    """A chat's prompt up to the end of its last message's text, for the model to go on."""
    said = messages[-1]["content"]
    for end in (said, said.rstrip(), said.strip()):  # templates may trim it
        if end and (at := text.rfind(end)) >= 0:
            return text[: at + len(end)]
    expected = "false: the chat template does not keep the last message's text"
    raise field_error("continue_final_message", True, expected)


def chat_logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs is None:
        return 0 if body.logprobs else None
    if not body.logprobs:
        raise field_error("top_logprobs", body.top_logprobs, "nothing unless logprobs is true")
    if not 0 <= body.top_logprobs <= 20:
        raise field_error("top_logprobs", body.top_logprobs, "an integer from 0 to 20")
    return body.top_logprobs


def completion_logprobs(body: CompletionRequest) -> int | None:
    if body.logprobs is not None and not 0 <= body.logprobs <= 20:
        raise field_error("logprobs", body.logprobs, "an integer from 0 to 20")
    return body.logprobs


def best_of(body: CompletionRequest) -> int:
    n, best = body.n or 1, body.best_of
    if best is None:
        return n
    if not n <= best <= 128:
        raise field_error("best_of", best, f"an integer from n ({n}) to 128")
    if best > n and body.stream:
        raise field_error("best_of", best, f"n ({n}) with stream: only complete outputs can be compared")
    return best


def silent(body: Sampling, prompt: bool) -> bool:
    """Only what it asks of its `prompt` is wanted, if it asks for anything. It still takes the engine a token."""
    if not prompt or body.max_tokens != 0:
        return False
    body.max_tokens = 1
    return True


def prompts(given: str | list[str] | list[int] | list[list[int]], field: str) -> list[str] | list[list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise field_error(field, given, f"at least one {field}")
    if isinstance(given[0], int):
        return [given]
    return given


def _bias(given: Mapping[str, float], vocab: int) -> dict[int, float]:
    out: dict[int, float] = {}
    for token, value in given.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocab):
            raise field_error("logit_bias", token, f"token ids from 0 to {vocab - 1} as keys")
        out[int(token)] = value
    return out


def sampling(body: Sampling, max_tokens: int, room: int, vocab: int, logprobs: int | None) -> SamplingParams:
    """Checked. `max_tokens` is the default; the engine is never asked for more than the `room` after the prompt."""
    wanted = max_tokens if body.max_tokens is None else body.max_tokens
    ids = tuple(body.stop_token_ids or ())
    for token in ids:
        if not 0 <= token < vocab:
            raise field_error("stop_token_ids", token, f"token ids from 0 to {vocab - 1}")
    given = {name: value for name in GIVEN if (value := getattr(body, name)) is not None}
    given["logit_bias"] = _bias(body.logit_bias or {}, vocab)
    spec = grammar(body.response_format, body.structured_outputs, body.model_extra or {})
    most = min(wanted, room)
    params = SamplingParams(max_tokens=most, stop_token_ids=ids, logprobs=logprobs, grammar=spec, **given)
    try:
        params.check()
    except InvalidParam as error:
        raise ApiError(400, str(error), error.param) from None
    return params
