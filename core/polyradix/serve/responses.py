"""OpenAI's Responses API over the same generation as chats: a request becomes a ChatRequest, its pieces become items.

Nothing is kept between requests. Source: OpenAI's API reference, "Responses" and "Streaming events".
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

import msgspec

from polyradix.serve.answer import Form, call_id
from polyradix.serve.errors import ApiError, field_error, parse
from polyradix.serve.generation import Choice, Generation, Piece
from polyradix.serve.openai import Body, ChatRequest, refuse
from polyradix.serve.parsers.feed import Arguments, Call, Event, Reasoning

Json = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant")
TEXTS = ("input_text", "output_text", "text")
FIELDS = (  # of the chat, and what they are called here
    (r"messages\b.*", "input"),
    (r"max_tokens", "max_output_tokens"),
    (r"reasoning_effort", "reasoning.effort"),
    (r"response_format\.json_schema\.(\w+)", r"text.format.\1"),
    (r"response_format\b(.*)", r"text.format\1"),
    (r"(tools\[\d+\])\.function\b(.*)", r"\1\2"),
    (r"tool_choice\.allowed_tools(.*)", r"tool_choice\1"),
)
REFUSED: Mapping[str, tuple[object, ...]] = {
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "store": (False,),
    "truncation": ("disabled",),
    "max_tool_calls": (),
    "top_logprobs": (0,),
    "include": ([], ["reasoning.encrypted_content"]),
}


class ResponsesRequest(Body):
    input: str | list[Json]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    text: Json | None = None
    reasoning: Json | None = None
    metadata: Json | None = None
    chat_template_kwargs: Json | None = None


SAME = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "chat_template_kwargs")


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The same, as a chat. Raises ApiError 400 that names the field."""
    refuse(body, REFUSED)
    chat: Json = {name: getattr(body, name) for name in SAME}
    chat["max_tokens"] = body.max_output_tokens
    chat["messages"] = _messages(body)
    chat["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(body.tools or [])] or None
    chat["tool_choice"] = _choice(body.tool_choice)
    chat["response_format"] = _format(body.text or {})
    chat["reasoning_effort"] = (body.reasoning or {}).get("effort")
    try:
        return parse(ChatRequest, msgspec.json.encode(chat))
    except ApiError as error:
        raise renamed(error) from None


def renamed(error: ApiError) -> ApiError:
    """The error of a chat, with the fields' names of this API."""
    if error.param is None:
        return error
    name = field_name(error.param)
    return ApiError(error.status, error.message.replace(error.param, name), name, error.code)


def field_name(chat: str) -> str:
    found = (m.expand(name) for pattern, name in FIELDS if (m := re.fullmatch(pattern, chat)))
    return next(found, chat)


def _messages(body: ResponsesRequest) -> list[Json]:
    out: list[Json] = []
    if body.instructions:
        out.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    if not items:
        raise field_error("input", items, "a string, or at least one item")
    reasoning = ""
    for i, item in enumerate(items):
        field, kind = f"input[{i}]", item.get("type", "message")
        if kind == "reasoning":
            reasoning = _text(item.get("content") or [], f"{field}.content", ("reasoning_text",))
            continue
        if kind == "function_call":
            names = ("call_id", "name", "arguments")
            id, name, arguments = (_string(item.get(n), f"{field}.{n}") for n in names)
            if not (out and out[-1].get("tool_calls")):
                out.append({"role": "assistant", "content": None, "tool_calls": []})
            call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
            out[-1]["tool_calls"].append(call)
        elif kind == "function_call_output":
            text = _text(item.get("output"), f"{field}.output", TEXTS)
            out.append(
                {"role": "tool", "content": text, "tool_call_id": _string(item.get("call_id"), f"{field}.call_id")}
            )
        elif kind == "message":
            if item.get("role") not in ROLES:
                raise field_error(f"{field}.role", item.get("role"), f"one of {', '.join(ROLES)}")
            out.append({"role": item["role"], "content": _text(item.get("content"), f"{field}.content", TEXTS)})
        else:
            raise field_error(f"{field}.type", kind, "message, function_call, function_call_output or reasoning")
        if reasoning and out[-1]["role"] == "assistant":
            out[-1]["reasoning_content"] = reasoning
        reasoning = ""
    return out


def _text(content: object, field: str, kinds: tuple[str, ...]) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise field_error(field, content, "a string, or a list of text parts")
    out = ""
    for i, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds:
            raise field_error(f"{field}[{i}]", part, f"a part of type {' or '.join(kinds)}")
        out += _string(part.get("text"), f"{field}[{i}].text")
    return out


def _string(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise field_error(field, value, "a string")
    return value


def _tool(tool: Json, field: str) -> Json:
    if tool.get("type") != "function":
        raise field_error(f"{field}.type", tool.get("type"), "'function': this server runs no tools of its own")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {n: tool[n] for n in names if n in tool}}


def _choice(given: str | Json | None) -> str | Json | None:
    """As chats have it: the function's name is one level deeper, and so is what allowed_tools says."""
    if not isinstance(given, dict):
        return given
    if given.get("type") == "allowed_tools":
        tools = given.get("tools")
        inner = given | {"tools": [_choice(tool) for tool in tools] if isinstance(tools, list) else tools}
        return {"type": "allowed_tools", "allowed_tools": inner}
    return given | {"function": {"name": given.get("name")}}


def _format(text: Json) -> Json | None:
    if text.get("verbosity") not in (None, "medium"):
        raise field_error("text.verbosity", text["verbosity"], "'medium'")
    form = text.get("format")
    if not isinstance(form, dict):
        if form is not None:
            raise field_error("text.format", form, "an object")
        return None
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {n: form.get(n) for n in ("name", "schema")}}


class ResponsesForm(Form):
    """One choice. Items are reasoning, a message, or a function call, one after the other as they come."""

    closing = b""

    def __init__(self, model: str, body: ResponsesRequest) -> None:
        self._model, self._body = model, body
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self._items: list[Json] = []
        self._open = False  # the last item is
        self._sequence = 0

    def piece(self, choice: Choice, piece: Piece) -> list[Json]:
        out: list[Json] = []
        if not self._sequence:
            out += [self._event("response.created", response=self._response("in_progress"))]
            out += [self._event("response.in_progress", response=self._response("in_progress"))]
        for event in piece.events:
            out += self._take(choice, event)
        if piece.finish is not None:
            if not self._items:
                out += self._begin({"type": "message", "role": "assistant", "content": []})
            out += self._close("incomplete" if piece.finish == "length" else "completed")
        return out

    def whole(self, run: Generation, pieces: list[list[Piece]]) -> Json:
        for piece in pieces[0]:
            self.piece(run.choices[0], piece)
        return self._done(run)

    def last(self, run: Generation) -> Json:
        response = self._done(run)
        return self._event(f"response.{response['status']}", response=response)

    def failure(self, error: ApiError) -> bytes:
        error = renamed(error)
        event = self._event("error", code=error.code, message=error.message, param=error.param)
        return b"event: error\ndata: " + msgspec.json.encode(event) + b"\n\n"

    def _event(self, kind: str, **fields: Any) -> Json:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **fields}

    def _take(self, choice: Choice, event: Event) -> list[Json]:
        if isinstance(event, Call):
            id = call_id(choice, event)
            item = {"type": "function_call", "call_id": id, "name": event.name, "arguments": ""}
            return self._close("completed") + self._begin(item)
        if isinstance(event, Arguments):
            self._items[-1]["arguments"] += event.text
            return [self._event("response.function_call_arguments.delta", delta=event.text, **self._place(False))]
        thinking = isinstance(event, Reasoning)
        kind = "reasoning" if thinking else "message"
        out: list[Json] = []
        if not self._open or self._items[-1]["type"] != kind:
            more: Json = {"summary": []} if thinking else {"role": "assistant"}
            out = self._close("completed") + self._begin({"type": kind, "content": [], **more})
        self._items[-1]["content"][0]["text"] += event.text
        name = "reasoning_text" if thinking else "output_text"
        logprobs: Json = {} if thinking else {"logprobs": []}
        return [*out, self._event(f"response.{name}.delta", delta=event.text, **self._place(), **logprobs)]

    def _place(self, content: bool = True) -> Json:
        place = {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}
        return place | ({"content_index": 0} if content else {})

    def _begin(self, item: Json) -> list[Json]:
        short = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[item["type"]]
        item |= {"id": f"{short}_{uuid.uuid4().hex}", "status": "in_progress"}
        self._items.append(item)
        self._open = True
        out = [self._event("response.output_item.added", output_index=len(self._items) - 1, item=_copy(item))]
        if item["type"] == "reasoning":
            item["content"] = [{"type": "reasoning_text", "text": ""}]
        elif item["type"] == "message":
            item["content"] = [{"type": "output_text", "text": "", "annotations": []}]
            part = dict(item["content"][0])
            out.append(self._event("response.content_part.added", part=part, **self._place()))
        return out

    def _close(self, status: str) -> list[Json]:
        if not self._open:
            return []
        self._open, item = False, self._items[-1]
        item["status"] = status
        if item["type"] == "function_call":
            kind, fields = "function_call_arguments", {"arguments": item["arguments"], **self._place(False)}
            out = [self._event(f"response.{kind}.done", name=item["name"], **fields)]
        elif item["type"] == "reasoning":
            out = [self._event("response.reasoning_text.done", text=item["content"][0]["text"], **self._place())]
        else:
            part = dict(item["content"][0])
            out = [self._event("response.output_text.done", text=part["text"], logprobs=[], **self._place())]
            out.append(self._event("response.content_part.done", part=part, **self._place()))
        return [*out, self._event("response.output_item.done", output_index=len(self._items) - 1, item=_copy(item))]

    def _done(self, run: Generation) -> Json:
        counts = run.counts()
        cut = run.choices[0].finish == "length"
        response = self._response("incomplete" if cut else "completed")
        response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        response["usage"] = {
            "input_tokens": counts.prompt,
            "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
            "output_tokens": counts.output,
            "output_tokens_details": {"reasoning_tokens": counts.reasoning},
            "total_tokens": counts.prompt + counts.output,
        }
        return response

    def _response(self, status: str) -> Json:
        b = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": b.instructions,
            "max_output_tokens": b.max_output_tokens,
            "model": self._model,
            "output": [_copy(item) for item in self._items],
            "parallel_tool_calls": b.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": (b.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "temperature": 1.0 if b.temperature is None else b.temperature,
            "text": b.text or {"format": {"type": "text"}},
            "tool_choice": b.tool_choice or "auto",
            "tools": b.tools or [],
            "top_p": 1.0 if b.top_p is None else b.top_p,
            "truncation": "disabled",
            "usage": None,
            "metadata": b.metadata or {},
        }


def _copy(item: Json) -> Json:
    return item | ({"content": [dict(part) for part in item["content"]]} if "content" in item else {})
