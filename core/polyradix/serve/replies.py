"""What clients get: OpenAI's response bodies as msgspec structs, cheap to build and to encode once per token."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from polyradix.engine.messages import TokenLogProbs

Finish = Literal["stop", "length", "tool_calls"]


class PromptDetails(msgspec.Struct):
    cached_tokens: int


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails


class TopLogProb(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogProb(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogProb]


class ChatLogProbs(msgspec.Struct):
    content: list[ChatLogProb]
    refusal: None = None


class CompletionLogProbs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]  # None for the first of an echoed prompt
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class FunctionDelta(msgspec.Struct):
    arguments: str = ""
    name: str | UnsetType = UNSET


class ToolCall(msgspec.Struct):
    """Of a stream: `index`, and only at its beginning id, type and name. In a whole message: all but the index."""

    function: FunctionDelta
    index: int | UnsetType = UNSET
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class Delta(msgspec.Struct, omit_defaults=True):
    """Reasoning is in both fields, as clients look for the one or the other."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class DeltaChoice(msgspec.Struct):
    index: int
    delta: Delta
    logprobs: ChatLogProbs | None = None
    finish_reason: Finish | None = None


class AnswerMessage(msgspec.Struct):
    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class MessageChoice(msgspec.Struct):
    index: int
    message: AnswerMessage
    logprobs: ChatLogProbs | None
    finish_reason: Finish


class TextChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogProbs | None = None
    finish_reason: Finish | None = None


class Reply(msgspec.Struct):
    """Any of the four bodies; `usage` is left out of stream chunks unless the client asked for it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[DeltaChoice] | list[MessageChoice] | list[TextChoice]
    usage: Usage | UnsetType | None = UNSET


class Generated(msgspec.Struct):
    """The native route's body and stream event. `output_ids` includes a stop token; `logprobs` leaves it out, as
    [logprob, [[id, logprob], ...]] per token. `prompt_logprobs` is the same, with null for the first token."""

    id: str
    output_ids: list[int]
    logprobs: list[TokenLogProbs] | None
    finish_reason: Finish | None
    usage: Usage | None  # in the last event
    prompt_logprobs: list[TokenLogProbs | None] | UnsetType = UNSET


def usage(prompt: int, completion: int, cached: int, reasoning: int = 0) -> Usage:
    return Usage(prompt, completion, prompt + completion, PromptDetails(cached), CompletionDetails(reasoning))
