"""Calls that must come: whatever a model would like to write, the grammar of each format leaves only what its parser
reads as calls whose arguments the schema allows."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema
import numpy as np
import pytest

from polyradix.grammar.compiler import LlgCompiler
from polyradix.grammar.spec import GrammarError, Matcher
from polyradix.schedule.params import SamplingParams
from polyradix.serve.errors import ApiError
from polyradix.serve.fake import ByteTokenizer
from polyradix.serve.generation import Choice
from polyradix.serve.openai import ChatRequest
from polyradix.serve.parsers.feed import Arguments, Call, Reasoning, Text
from polyradix.serve.structured import grammar
from polyradix.serve.tools import Formats, Talk

BAR = "\uff5c"
SCHEMA = {
    "type": "object",
    "properties": {
        "unit": {"enum": ["C", 'F"</tool_call>']},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["unit", "days"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 7}},
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "parameters": EMPTY}},
]


class Words(ByteTokenizer):
    """Bytes, the end, and special tokens from 257 on."""

    def __init__(self, template: str, marks: tuple[str, ...]) -> None:
        self.template, self.marks = template, marks
        self.special_ids = frozenset(range(256, 257 + len(marks)))
        self.vocab_size = 257 + len(marks)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        if not self.marks:
            return list(text.encode())
        parts = re.split("(" + "|".join(map(re.escape, self.marks)) + ")", text)
        return [i for p in parts for i in ([257 + self.marks.index(p)] if p in self.marks else p.encode())]

    def token_bytes(self, token: int) -> bytes:
        return self.marks[token - 257].encode() if token > 256 else super().token_bytes(token)


def allowed(matcher: Matcher, vocab: int) -> list[int]:
    row = np.zeros(-(-vocab // 32), np.int32)
    matcher.fill(row)
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")[:vocab]
    return [int(i) for i in np.flatnonzero(bits)]


def walk(matcher: Matcher, words: Words, start: str, r: random.Random) -> str:
    """`start`, and then whatever the grammar allows, ending where it may."""
    out = words.encode(start)
    for token in out:
        assert token in allowed(matcher, words.vocab_size), f"{start!r} is not allowed"
        matcher.accept(token)
    for _ in range(2000):
        can = allowed(matcher, words.vocab_size)
        assert can, "stuck"
        token = 256 if 256 in can and (can == [256] or r.random() < 0.4) else r.choice([i for i in can if i != 256])
        if token == 256:
            break
        out.append(token)
        if matcher.accept(token):
            break
    else:
        raise AssertionError("never ends")
    return b"".join(words.token_bytes(t) for t in out).decode()


HARMONY = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>")
FORMATS: list[tuple[str, str, tuple[str, ...]]] = [
    ("hermes", "", ()),
    ("hermes", "", ("<tool_call>", "</tool_call>")),
    ("qwen3-coder", "", ()),
    ("qwen3-coder", "", ("<tool_call>", "</tool_call>")),
    ("llama3", "", ("<|python_tag|>",)),
    ("mistral", "", ("[TOOL_CALLS]",)),
    ("mistral", "[ARGS]", ("[TOOL_CALLS]", "[ARGS]")),
    ("deepseek", "```json", ()),
    ("deepseek", "v3.1", (f"<{BAR}tool▁calls▁begin{BAR}>", f"<{BAR}tool▁sep{BAR}>")),
    ("gpt-oss", "", HARMONY),
]


def talk(words: Words, parser: str, reasoning: str, prompt: str = "", **body: Any) -> Choice:
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}]} | body)
    params = SamplingParams(grammar=grammar(request.response_format, None))
    formats = Formats(words, parser, reasoning)
    choice = Choice(0, [1], params, formats.view)
    Talk(formats, request).attach(choice, prompt)
    return choice


def outcome(words: Words, choice: Choice, start: str, r: random.Random) -> tuple[str, str, list[tuple[str, Any]]]:
    """(text, reasoning, calls) of a random output."""
    assert choice.params.grammar is not None
    assert choice.parser is not None
    compiler = LlgCompiler(lambda: words, words.vocab_size)
    try:
        matcher = compiler.compile(choice.params.grammar).result(30).matcher()
        output = walk(matcher, words, start, r)
    finally:
        compiler.close()
    events = choice.parser.push(output) + choice.parser.finish()
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, Call):
            calls.append((event.name, ""))
        elif isinstance(event, Arguments):
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    text, reasoning = ("".join(e.text for e in events if isinstance(e, kind)) for kind in (Text, Reasoning))
    return text, reasoning, [(name, json.loads(arguments)) for name, arguments in calls]


@pytest.mark.parametrize(("parser", "template", "marks"), FORMATS)
def test_required(parser: str, template: str, marks: tuple[str, ...]) -> None:
    words, most = Words(template, marks), 0
    for seed in range(8):
        choice = talk(words, parser, "none", tools=TOOLS, tool_choice="required")
        text, _, calls = outcome(words, choice, "", random.Random(seed))
        assert text == ""
        assert calls
        for name, arguments in calls:
            jsonschema.validate(arguments, SCHEMA if name == "weather" else EMPTY)
        most = max(most, len(calls))
    assert (most > 1) == (parser != "gpt-oss")


@pytest.mark.parametrize(("parser", "template", "marks"), FORMATS)
def test_named_and_not_parallel(parser: str, template: str, marks: tuple[str, ...]) -> None:
    words = Words(template, marks)
    chosen = {"type": "function", "function": {"name": "weather"}}
    for seed in range(3):
        choice = talk(words, parser, "none", tools=TOOLS, tool_choice=chosen)
        _, _, ((name, arguments),) = outcome(words, choice, "", random.Random(seed))
        assert name == "weather"
        jsonschema.validate(arguments, SCHEMA)
        choice = talk(words, parser, "none", tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
        assert len(outcome(words, choice, "", random.Random(seed))[2]) == 1


STRICT = [{"type": "function", "function": TOOLS[0]["function"] | {"strict": True}}, TOOLS[1]]


@pytest.mark.parametrize(("parser", "template", "marks"), FORMATS)
def test_a_strict_call_is_held_to_its_schema_once_it_has_begun(
    parser: str, template: str, marks: tuple[str, ...]
) -> None:
    words = Words(template, marks)
    assert talk(words, parser, "none", tools=TOOLS).params.grammar is None
    form = Formats(words, parser, "none").tools
    assert form is not None
    trigger = form.shape.trigger
    if parser in ("llama3", "gpt-oss"):
        assert not trigger
        assert talk(words, parser, "none", tools=STRICT).params.grammar is None
        return
    for seed in range(4):
        choice = talk(words, parser, "none", tools=STRICT, parallel_tool_calls=seed < 3)
        text, _, calls = outcome(words, choice, f"Hi <too.{trigger}", random.Random(seed))
        assert text.startswith("Hi <too.")
        assert calls
        for name, arguments in calls:
            jsonschema.validate(arguments, SCHEMA if name == "weather" else EMPTY)
        assert outcome(words, talk(words, parser, "none", tools=STRICT), "Hi", random.Random(seed))[0].startswith("Hi")


REASONING: list[tuple[str, tuple[str, ...], str, str, str]] = [
    ("qwen3", (), "", "<think>\nSo {</think>\n\n", "So {"),
    ("qwen3", (), "", "", ""),
    ("qwen3", ("<think>", "</think>"), "", "<think>\nSo {</think>\n\n", "So {"),
    ("qwen3", (), "<think>\n", "So {</think>", "So {"),
    ("qwen3", (), "<think>\n\n</think>\n\n", "", ""),
    ("deepseek-r1", (), "", "So {</think>\n\n", "So {"),
    ("gpt-oss", HARMONY, "", "<|channel|>analysis<|message|>So {<|end|>", "So {"),
    ("gpt-oss", HARMONY, "", "<|channel|>", ""),
]


@pytest.mark.parametrize(("reasoning", "marks", "prompt", "start", "said"), REASONING)
def test_a_form_is_kept_after_reasoning(
    reasoning: str, marks: tuple[str, ...], prompt: str, start: str, said: str
) -> None:
    words = Words("", marks)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    start = start.replace("<|channel|>", "<|channel|>final", 1) if start == "<|channel|>" else start
    choice = talk(words, "none", reasoning, prompt, response_format=form)
    text, thought, _ = outcome(words, choice, start or "{", random.Random(1))
    jsonschema.validate(json.loads(text), SCHEMA)
    assert thought == said
    must = {"tools": TOOLS, "tool_choice": "required"}
    choice = talk(words, "auto" if reasoning == "gpt-oss" else "hermes", reasoning, prompt, **must)
    start = start.replace("final", "commentary") or "<tool_call>"
    text, thought, calls = outcome(words, choice, start, random.Random(1))
    assert (text, thought, bool(calls)) == ("", said, True)


def test_a_form_or_a_call() -> None:
    words = Words("", ())
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    for start, called in (("{", False), ("<tool_call>", True)):
        choice = talk(words, "hermes", "none", tools=TOOLS, response_format=form)
        text, _, calls = outcome(words, choice, start, random.Random(2))
        assert bool(calls) == called
        if not called:
            jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    "form",
    [
        {"type": "regex", "regex": "[0-9]{3}"},
        {"type": "grammar", "grammar": 'start: "1" "23"'},
        {"type": "json_object"},
    ],
)
def test_other_forms_after_reasoning(form: dict[str, Any]) -> None:
    words = Words("", ())
    choice = talk(words, "none", "qwen3", response_format=form)
    start = "<think>a</think>" + ("{}" if form["type"] == "json_object" else "123")
    text, thought, _ = outcome(words, choice, start, random.Random(2))
    assert (text, thought) == (start.partition("</think>")[2], "a")


def test_strings_between_marks_are_any_text_and_can_be_held_to_no_form() -> None:
    words = Words("", ())
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": ["integer", "null"]}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    start = '<tool_call>\n<function=f>\n<parameter=a>\n"1" <\n\n</parameter>\n<parameter=b>\n'
    choice = talk(words, "qwen3-coder", "none", tools=tools, tool_choice="required", parallel_tool_calls=False)
    _, _, ((_, arguments),) = outcome(words, choice, start, random.Random(1))
    assert arguments["a"] == '"1" <\n'
    jsonschema.validate(arguments, schema)
    schema["properties"]["a"] = {"type": "string", "pattern": "x"}
    with pytest.raises(ApiError, match="parameter 'a': pattern"):
        talk(words, "qwen3-coder", "none", tools=tools, tool_choice="required")


def test_a_schema_that_cannot_be_kept_names_the_field() -> None:
    words = Words("", ())
    wrong = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    choice = talk(words, "hermes", "none", tools=[wrong], tool_choice="required")
    assert choice.params.grammar is not None
    assert choice.params.grammar.field == "tools"
    compiler = LlgCompiler(lambda: words, words.vocab_size)
    with pytest.raises(GrammarError, match="not"):
        compiler.compile(choice.params.grammar).result(30)
    compiler.close()
