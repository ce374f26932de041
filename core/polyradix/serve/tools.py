"""Tools and reasoning of a chat: what a request may ask, what the template sees, and what reads the output."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from polyradix.grammar.spec import GrammarError, GrammarSpec
from polyradix.serve.errors import ApiError, field_error
from polyradix.serve.generation import Choice, Tokens
from polyradix.serve.openai import ChatRequest, Tool
from polyradix.serve.parsers import reasoning_format, tool_format
from polyradix.serve.parsers.base import Parser
from polyradix.serve.parsers.feed import Feed, Script, Text
from polyradix.serve.parsers.grammar import calls, frame, offered
from polyradix.serve.parsers.harmony import Harmony
from polyradix.serve.parsers.thinking import begins_inside, think

NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
MAX_TOOLS = 128
EFFORTS = ("minimal", "low", "medium", "high")


@dataclass(frozen=True)
class _View:
    """A tokenizer whose special tokens that a parser looks for are ordinary text."""

    special_ids: frozenset[int]
    eos_ids: Iterable[int]
    vocab_size: int
    template: str
    longest: int
    _inner: Tokens

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return self._inner.encode(text, add_special)

    def token_bytes(self, token: int) -> bytes:
        return self._inner.token_bytes(token)

    def chat_prompt(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        return self._inner.chat_prompt(messages, **kwargs)


class Formats:
    """Of the served model: `tools` is its format of calls, None if nobody knows; `reasoning` a parser's name or ""."""

    def __init__(self, tokenizer: Tokens, tools: str = "auto", reasoning: str = "auto") -> None:
        self.tokenizer = tokenizer
        self.tools = tool_format(tools, tokenizer.template)
        self.reasoning = reasoning_format(reasoning, tokenizer.template)
        if self.reasoning == "gpt-oss":
            self.tools = Harmony()

    @cached_property
    def view(self) -> Tokens:
        """What outputs are read with."""
        t = self.tokenizer
        marks = {mark.encode() for mark in ("<think>", "</think>", *(self.tools.marks if self.tools else ()))}
        hidden = frozenset(i for i in t.special_ids if t.token_bytes(i) not in marks)
        return _View(hidden, t.eos_ids, t.vocab_size, t.template, t.longest, t)

    def special(self, text: str) -> int | None:
        ids = self.tokenizer.encode(text, False)
        return ids[0] if len(ids) == 1 and ids[0] in self.tokenizer.special_ids else None


class Talk:
    """One request. Raises ApiError 400 that names the field."""

    def __init__(self, formats: Formats, body: ChatRequest) -> None:
        self._formats = formats
        tools = body.tools or []
        _check_tools(tools)
        self._mode, self._named, allowed = _tool_choice(body.tool_choice, [tool.function.name for tool in tools])
        self._tools = [] if self._mode == "none" else [tool for tool in tools if tool.function.name in allowed]
        if self._tools and formats.tools is None:
            why = "this model's way to call them is not known; see --tool-call-parser"
            raise ApiError(400, f"tools cannot be used: {why}", "tools")
        self._parallel = body.parallel_tool_calls is not False and self._named is None
        self.variables = self._variables(body)

    def _variables(self, body: ChatRequest) -> dict[str, Any]:
        """Of the chat template."""
        out: dict[str, Any] = {}
        if self._tools:
            out["tools"] = [tool.model_dump(exclude_none=True) for tool in self._tools]
        if (effort := body.reasoning_effort) is not None:
            known = EFFORTS if "reasoning_effort" in self._formats.tokenizer.template else ()
            if effort not in known:
                raise field_error("reasoning_effort", effort, f"one of {', '.join(known)}" if known else "nothing")
            out["reasoning_effort"] = effort
        return out

    def adapted(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """As the model's template expects them."""
        form = self._formats.tools
        return messages if form is None else [form.adapt(message) for message in messages]

    @property
    def plain(self) -> bool:
        """There is nothing to parse."""
        return not self._tools and not self._formats.reasoning

    def attach(self, choice: Choice, prompt: str) -> None:
        """Gives the choice its parser, and a grammar that lets reasoning pass and ensures calls that must come."""
        if self.plain:
            return
        inside = begins_inside(prompt, self._formats.reasoning == "deepseek-r1")
        feed = Feed()
        tools = {tool.function.name: tool.function.parameters for tool in self._tools}
        form = self._formats.tools
        harmonic = isinstance(form, Harmony)
        script = form.parse(feed, tools) if form and (self._tools or harmonic) else _text(feed)
        if self._formats.reasoning and not harmonic:
            script = think(feed, inside, script)
        choice.parser = Parser(feed, script, single=not self._parallel)
        choice.new_id = form.new_id if form else None
        spec = self._grammar(choice.params.grammar, inside)
        choice.params = msgspec.structs.replace(choice.params, grammar=spec)

    def _grammar(self, asked: GrammarSpec | None, inside: bool | None) -> GrammarSpec | None:
        formats, must = self._formats, self._mode == "required"
        held = formats.tools is not None and formats.tools.shape.trigger and any(t.function.strict for t in self._tools)
        if asked is None and not must and not held:
            return None
        rules = ""
        if self._tools and formats.tools is not None:
            chosen = [t.function for t in self._tools if self._named in (None, t.function.name)]
            pairs = [(f.name, f.parameters) for f in chosen]
            write = calls if must or asked is not None else offered
            try:
                rules = write(formats.tools, pairs, self._parallel, formats.special)
            except GrammarError as error:
                raise ApiError(400, f"tools cannot be used: {error}", "tools") from None
        body = asked is not None and not must
        lark = frame(formats.reasoning, inside, rules, body=body, special=formats.special)
        if must or asked is None:
            return GrammarSpec(kind="lark", source=lark, field="tools")
        return msgspec.structs.replace(asked, frame=lark)


def _text(feed: Feed) -> Script:
    yield from feed.until(to=Text)


def _check_tools(tools: list[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise field_error("tools", f"{len(tools)} tools", f"at most {MAX_TOOLS}")
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        field, name = f"tools[{i}].function", tool.function.name
        if not NAME.fullmatch(name) or name in seen:
            raise field_error(f"{field}.name", name, "1 to 64 letters, digits, '_', '-' or '.', and no name twice")
        seen.add(name)
        _check_schema(tool.function.parameters or {}, f"{field}.parameters")


def _check_schema(schema: dict[str, Any], field: str) -> None:
    kinds = (("type", str, "'object'"), ("properties", dict, "an object"), ("required", list, "a list of strings"))
    for name, kind, expected in kinds:
        value: Any = schema.get(name)
        wrong = not isinstance(value, kind) or (name == "type" and value != "object")
        if name in schema and (wrong or (name == "required" and not all(isinstance(v, str) for v in value))):
            raise field_error(f"{field}.{name}", value, expected)
    for name, value in schema.get("properties", {}).items():
        if not isinstance(value, dict | bool):
            raise field_error(f"{field}.properties.{name}", value, "a JSON schema")


def _tool_choice(given: str | dict[str, Any] | None, names: list[str]) -> tuple[str, str | None, list[str]]:
    """`none`, `auto` or `required`; the function that it must be, if one; and those that it may be."""
    if given is None or given in ("none", "auto"):
        return ("none" if given == "none" or not names else "auto"), None, names
    if not names:
        raise field_error("tool_choice", given, "nothing unless tools are given")
    if given == "required":
        return "required", None, names
    form = given if isinstance(given, dict) else {}
    if form.get("type") == "allowed_tools":
        return _allowed(form.get("allowed_tools"), names)
    name = _name(form)
    if name is None:
        expected = "'none', 'auto', 'required', {'type': 'function', 'function': {'name': ...}} or allowed_tools"
        raise field_error("tool_choice", given, expected)
    if name not in names:
        raise field_error("tool_choice", name, f"one of the tools: {', '.join(names)}")
    return "required", name, names


def _allowed(given: object, names: list[str]) -> tuple[str, None, list[str]]:
    form = given if isinstance(given, dict) else {}
    mode, tools = form.get("mode"), form.get("tools")
    if mode not in ("auto", "required"):
        raise field_error("tool_choice.allowed_tools.mode", mode, "'auto' or 'required'")
    allowed = [_name(tool) for tool in tools] if isinstance(tools, list) else []
    if not allowed or not set(allowed) <= set(names):
        raise field_error("tool_choice.allowed_tools.tools", tools, f"functions among the tools: {', '.join(names)}")
    return mode, None, [name for name in names if name in allowed]


def _name(tool: object) -> str | None:
    """Of `{"type": "function", "function": {"name": ...}}`, None for anything else."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None
