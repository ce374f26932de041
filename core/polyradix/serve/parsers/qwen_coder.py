"""`<tool_call>`, `<function=NAME>`; of each argument `<parameter=KEY>`, the value on lines of its own, `</parameter>`;
then `</function>`, `</tool_call>`. A string is written as it is, anything else as JSON.

Source: the chat template of Qwen/Qwen3-Coder-30B-A3B-Instruct, and the parser qwen3coder_tool_parser.py beside it. The
model may leave out `<tool_call>`.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from typing import Any

import msgspec

from polyradix.grammar.compiler import JSON_FORM
from polyradix.grammar.spec import GrammarError
from polyradix.serve.parsers.base import ANYTHING, Format, Schema, Shape
from polyradix.serve.parsers.feed import Arguments, Call, Event, Feed, Script, Text

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, END_FUNCTION = "<function=", "</function>"
PARAMETER, END_PARAMETER = "<parameter=", "</parameter>"
PYTHON = {"True": "true", "False": "false", "None": "null"}


class QwenCoder(Format):
    marks = (BEGIN, END)
    shape = Shape(f"{BEGIN}\n{FUNCTION}NAME>\n", f"{END_FUNCTION}\n{END}", between="\n", trigger=BEGIN)

    def parse(self, feed: Feed, tools: Mapping[str, Schema]) -> Script:
        while mark := (yield from feed.until(BEGIN, FUNCTION, to=Text, trim=True)):
            feed.taken = mark
            if mark == BEGIN and (yield from feed.next(FUNCTION)) == FUNCTION:
                mark = feed.take(len(FUNCTION))
            name, end = (yield from feed.hold(">", "\n")) if mark == FUNCTION else ("", "")
            if end != ">" or name not in tools:
                yield Text(feed.taken)
                continue
            yield Call(name)
            yield from _arguments(feed, tools[name] or {})
            for end in (END_FUNCTION, END):
                if (yield from feed.next(end)) == end:
                    feed.take(len(end))
            yield from feed.next()

    def arguments(self, rule: str, schema: Schema) -> str:
        """Raises GrammarError for a string with a form that text between marks cannot be held to."""
        whole = schema or ANYTHING
        free, parts, rules = f"{rule}_text", list[str](), list[str]()
        required = whole.get("required", [])
        for i, (key, value) in enumerate(whole.get("properties", {}).items()):
            rules.append(f"{rule}_{i}: {json.dumps(f'{PARAMETER}{key}>' + chr(10))} {_value(key, value, whole, free)}")
            parts.append(f"{rule}_{i}" + ("" if key in required else "?"))
        lark = " ".join(parts) or '""'
        return "\n".join([f"{rule}: {lark}", *rules, f"{free}[lazy]: /(.|\\n)*<\\/parameter>/"])


def _arguments(feed: Feed, schema: dict[str, Any]) -> Script:
    """What has been written is closed; an output that was cut short is not."""
    before = "{"
    while (yield from feed.next(PARAMETER)) == PARAMETER:
        feed.take(len(PARAMETER))
        key, end = yield from feed.hold(">")
        if not end:
            return
        yield Arguments(f"{before}{json.dumps(key, ensure_ascii=False)}: ")
        before = ", "
        while not feed.text and not feed.closed:
            yield None
        feed.take(feed.text.startswith("\n"))
        if not (yield from _read(feed, text=_is_text(schema.get("properties", {}).get(key, True)))):
            return
    if feed.text:
        yield Arguments("{}" if before == "{" else "}")


def _read(feed: Feed, text: bool) -> Generator[Event | None, None, str]:
    """A value; returns its end mark, "" if it was cut short."""
    ends = (f"\n{END_PARAMETER}", END_PARAMETER)
    if text:
        yield Arguments('"')
        end = yield from feed.until(*ends, to=_escaped)
        if end:
            yield Arguments('"')
        return end
    value, end = yield from feed.hold(*ends)
    if end:
        yield Arguments(_json(value.strip()))
    return end


def _escaped(text: str) -> Arguments:
    return Arguments(json.dumps(text, ensure_ascii=False)[1:-1])


def _json(text: str) -> str:
    """As the model wrote it if that is JSON, else a string; models also write Python's constants."""
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return PYTHON.get(text) or json.dumps(text, ensure_ascii=False)
    return text


def _is_text(schema: dict[str, Any] | bool) -> bool:
    """Whether a value is taken as a string: also where nothing is said of it."""
    if isinstance(schema, bool):
        return True
    kinds = schema.get("type", [])
    if any(name in schema for name in ("$ref", "allOf", "anyOf", "oneOf")) and not kinds:
        branches = [b for name in ("anyOf", "oneOf") for b in schema.get(name, [])]
        return any(_is_text(b) for b in branches)
    if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
        return all(isinstance(v, str) for v in values)
    return not kinds or "string" in ([kinds] if isinstance(kinds, str) else kinds)


def _value(key: str, schema: dict[str, Any] | bool, whole: dict[str, Any], free: str) -> str:
    """In Lark, with the end mark and the line break after it."""
    end = json.dumps(f"\n{END_PARAMETER}\n")
    if isinstance(schema, dict) and not _is_text(schema):
        defs = {name: whole[name] for name in ("$defs", "definitions") if name in whole}
        return f"%json {json.dumps(defs | schema | {'x-guidance': JSON_FORM})} {end}"
    if isinstance(schema, dict):
        if values := schema.get("enum") or ([schema["const"]] if "const" in schema else []):
            return f"({' | '.join(json.dumps(v) for v in values)}) {end}"
        for name in ("pattern", "format", "minLength", "maxLength"):
            if name in schema:
                raise GrammarError(f"parameter {key!r}: {name} cannot be ensured in this model's way to call tools")
    return f'{free} "\\n"'
