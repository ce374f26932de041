"""Canned outputs in the formats of the models' templates (named in each parser's file), split in every way."""

from __future__ import annotations

import random
from typing import Any

import pytest

from polyradix.serve.parsers import reasoning_format, tool_format
from polyradix.serve.parsers.base import Parser
from polyradix.serve.parsers.feed import Arguments, Call, Event, Feed, Text
from polyradix.serve.parsers.thinking import begins_inside, think

BAR = "\uff5c"
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "array"}, "on": {"type": "boolean"}},
}
NAMES = {"get_weather": WEATHER, "now": None}


def joined(events: list[Event]) -> list[tuple[str, ...]]:
    """Neighbours of a kind become one; a call has its arguments."""
    out: list[tuple[str, ...]] = []
    for event in events:
        if isinstance(event, Call):
            out.append(("call", event.name, event.id, ""))
        elif isinstance(event, Arguments):
            assert out[-1][0] == "call"
            out[-1] = (*out[-1][:-1], out[-1][-1] + event.text)
        else:
            kind = "text" if isinstance(event, Text) else "reasoning"
            if out and out[-1][0] == kind:
                out[-1] = (kind, out[-1][1] + event.text)
            else:
                out.append((kind, event.text))
    return out


def pieces(text: str) -> list[list[str]]:
    """The whole, single characters, and a few random splits."""
    r = random.Random(1)
    out = [[text], list(text)]
    for _ in range(6):
        cuts = sorted(r.sample(range(len(text) + 1), min(6, len(text))))
        out.append([text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)])
    return out


def parse(make: Any, text: str, single: bool = False) -> list[tuple[str, ...]]:
    results = []
    for parts in pieces(text):
        feed = Feed()
        parser = Parser(feed, make(feed), single)
        events = [e for part in parts for e in parser.push(part)] + parser.finish()
        assert all(e.text for e in events if not isinstance(e, Call)), "empty event"
        results.append(joined(events))
    assert all(r == results[0] for r in results)
    return results[0]


def call(name: str, arguments: str, id: str = "") -> tuple[str, ...]:
    return ("call", name, id, arguments)


PARIS = '{"city": "Pa\\"r}is", "days": [1, {"a": 2}]}'
CASES: list[tuple[str, str, str, list[tuple[str, ...]]]] = [
    ("hermes", "", "Hello, world < 5 <tool", [("text", "Hello, world < 5 <tool")]),
    (
        "hermes",
        "",
        f'Let me see.\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        [("text", "Let me see."), call("get_weather", PARIS), call("now", "{}")],
    ),
    (
        "qwen",
        "",
        f'<tool_call>{{"arguments": {PARIS}, "id": 5, "name": "x"}}</tool_call> done',
        [call("x", PARIS), ("text", "done")],
    ),
    ("hermes", "", '<tool_call>\n{"name": "now"}\n</tool_call>', [call("now", "{}")]),
    ("hermes", "", '<tool_call>{"name": "now", "arguments": {"a": ', [call("now", '{"a": ')]),
    ("hermes", "", "<tool_call>nonsense</tool_call>", [("text", "<tool_call>nonsense</tool_call>")]),
    ("hermes", "", '<tool_call>{"a": [1]}', [("text", '<tool_call>{"a": [1]}')]),
    (
        "qwen3-coder",
        "",
        'I see.\n\n<tool_call>\n<function=get_weather>\n<parameter=city>\nPa"r}is\n</parameter>\n<parameter=days>\n'
        '[1, {"a": 2}]\n</parameter>\n</function>\n</tool_call>\n<tool_call><function=now>\n</function>\n</tool_call>',
        [("text", "I see."), call("get_weather", PARIS), call("now", "{}")],
    ),
    (
        "qwen3-coder",
        "",
        "<function=get_weather>\n<parameter=city>\n\n a\n\tb <c>\n\n</parameter>\n<parameter=on>\nTrue\n</parameter>\n"
        "<parameter=days>monday</parameter><parameter=new>5</parameter></function>",
        [call("get_weather", '{"city": "\\n a\\n\\tb <c>\\n", "on": true, "days": "monday", "new": "5"}')],
    ),
    (
        "qwen3-coder",
        "",
        "<tool_call>\n<function=get_weather>\n<parameter=days>\nNaN\n</parameter>\n<parameter=city>\nPar",
        [call("get_weather", '{"days": "NaN", "city": "Par')],
    ),
    ("qwen3-coder", "", "so <function=f> and <tool_call>x", [("text", "so<function=f> and<tool_call>x")]),
    ("llama3", "", f'{{"name": "get_weather", "parameters": {PARIS}}}', [call("get_weather", PARIS)]),
    (
        "llama3",
        "",
        f'<|python_tag|>{{"name": "get_weather", "parameters": {PARIS}}}; {{"name": "now", "parameters": {{}}}}',
        [call("get_weather", PARIS), call("now", "{}")],
    ),
    (
        "llama3",
        "",
        f'{{"type": "function", "name": "now", "parameters": {PARIS}}}',
        [call("now", PARIS)],
    ),
    ("llama3", "", '{"name": "Bob", "age": 5} is it', [("text", '{"name": "Bob", "age": 5} is it')]),
    ("llama3", "", '{"a": {"name": "now"}}', [("text", '{"a": {"name": "now"}}')]),
    ("llama3", "", "Hi {there}", [("text", "Hi {there}")]),
    (
        "mistral",
        "",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}, {{"name": "now", "arguments": {{}}}}]',
        [call("get_weather", PARIS), call("now", "{}")],
    ),
    (
        "mistral",
        "[ARGS]",
        f"Sure [TOOL_CALLS]get_weather[ARGS]{PARIS}[TOOL_CALLS]now[CALL_ID]abcdefghi[ARGS]{{}}",
        [("text", "Sure"), call("get_weather", PARIS), call("now", "{}", "abcdefghi")],
    ),
    ("mistral", "", 'see [TOOL_CALLS]now{"a": 1}', [("text", "see"), call("now", '{"a": 1}')]),
    ("mistral", "", "a [TOOL] b [TOOL_CALLS]", [("text", "a [TOOL] b[TOOL_CALLS]")]),
    (
        "deepseek",
        "",
        f"Ok.<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>get_weather\n```json\n"
        f"{PARIS}\n```<{BAR}tool▁call▁end{BAR}>\n<{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>now\n```json\n"
        f"{{}}\n```<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>",
        [("text", "Ok."), call("get_weather", PARIS), call("now", "{}")],
    ),
    (
        "deepseek",
        "",
        f"<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>get_weather<{BAR}tool▁sep{BAR}>{PARIS}"
        f"<{BAR}tool▁call▁end{BAR}><{BAR}tool▁call▁begin{BAR}>now<{BAR}tool▁sep{BAR}>{{}}<{BAR}tool▁call▁end{BAR}>"
        f"<{BAR}tool▁calls▁end{BAR}>",
        [call("get_weather", PARIS), call("now", "{}")],
    ),
    (
        "gpt-oss",
        "",
        "<|channel|>analysis<|message|>Need the weather.<|end|><|start|>assistant<|channel|>commentary "
        f"to=functions.get_weather <|constrain|>json<|message|>{PARIS}<|call|>",
        [("reasoning", "Need the weather."), call("get_weather", PARIS)],
    ),
    (
        "gpt-oss",
        "",
        "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant<|channel|>commentary<|message|>One moment. "
        f"<|end|><|start|>assistant to=functions.now<|channel|>commentary json<|message|>{PARIS}",
        [("reasoning", "Easy."), ("text", "One moment. "), call("now", PARIS)],
    ),
    ("gpt-oss", "", "<|channel|>final<|message|>Hello <|", [("text", "Hello <|")]),
    ("gpt-oss", "", "Hello", [("text", "Hello")]),
    ("gpt-oss", "", "<|channel|>ana", []),
]


@pytest.mark.parametrize(("name", "template", "text", "want"), CASES)
def test_formats(name: str, template: str, text: str, want: list[tuple[str, ...]]) -> None:
    form = tool_format(name, template)
    assert form is not None
    assert parse(lambda feed: form.parse(feed, NAMES), text) == want


def test_arguments_stream_as_they_come() -> None:
    form, feed = tool_format("hermes", ""), Feed()
    assert form is not None
    parser = Parser(feed, form.parse(feed, NAMES))
    assert parser.push('<tool_call>\n{"name": "now", "arg') == [Call("now")]
    assert parser.push('uments": {"a": "b') == [Arguments('{"a": "b')]
    assert parser.push("c") == [Arguments("c")]
    assert parser.push('"}') == [Arguments('"}')]
    assert parser.push("}\n</tool_call>") == []


def test_one_call_only() -> None:
    form = tool_format("hermes", "")
    assert form is not None
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>' * 2
    assert parse(lambda feed: form.parse(feed, NAMES), text, single=True) == [call("now", "{}")]


def rest(feed: Feed) -> Any:
    form = tool_format("hermes", "")
    assert form is not None
    return form.parse(feed, NAMES)


@pytest.mark.parametrize(
    ("inside", "text", "want"),
    [
        (False, "<think>\nHm.\n\nSo.\n</think>\n\nYes.", [("reasoning", "Hm.\n\nSo."), ("text", "Yes.")]),
        (False, "Yes, <think> no.", [("text", "Yes, <think> no.")]),
        (False, "<thi", [("text", "<thi")]),
        (True, "Hm.</think>Yes.", [("reasoning", "Hm."), ("text", "Yes.")]),
        (True, "<think>Hm.</think>Yes.", [("reasoning", "Hm."), ("text", "Yes.")]),
        (True, "Hm. </thin", [("reasoning", "Hm. </thin")]),
        (None, "Yes</think>.", [("text", "Yes</think>.")]),
        (
            True,
            'Hm.</think>\n<tool_call>{"name": "now", "arguments": {}}</tool_call>',
            [("reasoning", "Hm."), call("now", "{}")],
        ),
    ],
)
def test_thinking(inside: bool | None, text: str, want: list[tuple[str, ...]]) -> None:
    assert parse(lambda feed: think(feed, inside, rest(feed)), text) == want


def test_where_thinking_begins() -> None:
    assert begins_inside("<|im_start|>assistant\n<think>\n", False) is True
    assert begins_inside("<|im_start|>assistant\n<think>\n\n</think>\n\n", True) is None
    assert begins_inside("<|im_start|>assistant\n", False) is False
    assert begins_inside("assistant\n", True) is True


@pytest.mark.parametrize(
    ("template", "tools", "reasoning"),
    [
        ("x", None, ""),
        ("<|channel|>", "Harmony", "gpt-oss"),
        ("<tool_call> <think>", "Hermes", "qwen3"),
        ("<tool_call>", "Hermes", ""),
        ("<tool_call> <parameter=", "QwenCoder", ""),
        ("[TOOL_CALLS]", "Mistral", ""),
        ("<|python_tag|>", "Llama3", ""),
        (f"<{BAR}tool▁call▁begin{BAR}> </think> <{BAR}Assistant{BAR}>", "DeepSeek", "deepseek-r1"),
    ],
)
def test_the_template_tells(template: str, tools: str | None, reasoning: str) -> None:
    form = tool_format("auto", template)
    assert (None if form is None else type(form).__name__) == tools
    assert reasoning_format("auto", template) == reasoning
    assert tool_format("none", template) is None
    assert reasoning_format("none", template) == ""
