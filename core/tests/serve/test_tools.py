"""Tools and reasoning through the official client: canned outputs behind a live server, in each model's format."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from polyradix.engine.messages import Chunk
from polyradix.serve.fake import ByteTokenizer, FakeEngine

BAR = "\uff5c"
MARKS = (
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|start|>",
    "<|constrain|>",
    "<|python_tag|>",
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
PARIS = '{"city": "Paris"}'
HELLO: list[Any] = [{"role": "user", "content": "hi"}]


class Special(ByteTokenizer):
    """Bytes, and special tokens from 257 on."""

    special_ids = frozenset(range(256, 257 + len(MARKS)))
    vocab_size = 257 + len(MARKS)

    def __init__(self, template: str = "") -> None:
        self.template = template
        self.seen: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        out: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, MARKS)) + ")", text):
            out += [257 + MARKS.index(part)] if part in MARKS else list(part.encode())
        return out

    def token_bytes(self, token: int) -> bytes:
        return MARKS[token - 257].encode() if token > 256 else super().token_bytes(token)

    def chat_prompt(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        self.seen.append((messages, kwargs))
        return "prompt" + kwargs.get("tail", "")


@pytest.fixture
def serve(make_live: Any) -> Iterator[Callable[..., Any]]:
    with contextlib.ExitStack() as stack:

        def serve(
            output: str,
            tool_parser: str = "auto",
            reasoning_parser: str = "auto",
            template: str = "",
            engine: Callable[..., FakeEngine] = FakeEngine,
        ) -> Any:
            tokenizer = Special(template)
            fake = engine(lambda _: tokenizer.encode(output), max_context=10**9)
            parsers = {"tool_parser": tool_parser, "reasoning_parser": reasoning_parser}
            live = stack.enter_context(make_live(fake, tokenizer, **parsers))
            live.client = stack.enter_context(openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0))
            live.tokenizer = tokenizer
            return live

        yield serve


def ask(live: Any, stream: bool, **body: Any) -> tuple[str | None, str, list[tuple[str, str, str]], str]:
    """(content, reasoning, calls as (id, name, arguments), finish reason)."""
    body = {"model": "fake", "messages": HELLO} | body
    if not stream:
        choice = live.client.chat.completions.create(**body).choices[0]
        message = choice.message
        calls = [(c.id, c.function.name, c.function.arguments) for c in message.tool_calls or []]
        reasoning = getattr(message, "reasoning_content", "")
        assert reasoning == getattr(message, "reasoning", "")
        return message.content, reasoning, calls, choice.finish_reason
    content, reasoning, found, finish = "", "", list[list[str]](), ""
    for chunk in live.client.chat.completions.create(stream=True, **body):
        delta, finish = chunk.choices[0].delta, chunk.choices[0].finish_reason
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or []:
            if call.index == len(found):
                assert (call.type, call.id is None) == ("function", False)
                found.append([call.id, call.function.name, call.function.arguments])
            else:
                assert (call.index, call.id, call.function.name) == (len(found) - 1, None, None)
                found[-1][2] += call.function.arguments
    return content, reasoning, [(a, b, c) for a, b, c in found], finish


FORMATS: list[tuple[str, str, str]] = [
    ("hermes", f'Ok.\n<tool_call>\n{{"name": "get_weather", "arguments": {PARIS}}}\n</tool_call>', "Ok."),
    ("llama3", f'{{"name": "get_weather", "parameters": {PARIS}}}', ""),
    ("mistral", f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {PARIS}}}]', ""),
    ("mistral", f"Ok.[TOOL_CALLS]get_weather[ARGS]{PARIS}", "Ok."),
    (
        "deepseek",
        f"Ok.<{BAR}tool▁calls▁begin{BAR}><{BAR}tool▁call▁begin{BAR}>function<{BAR}tool▁sep{BAR}>get_weather\n"
        f"```json\n{PARIS}\n```<{BAR}tool▁call▁end{BAR}><{BAR}tool▁calls▁end{BAR}>",
        "Ok.",
    ),
    ("gpt-oss", f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{PARIS}", ""),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("parser", "output", "text"), FORMATS)
def test_calls(serve: Any, parser: str, output: str, text: str, stream: bool) -> None:
    live = serve(output, parser)
    content, reasoning, calls, finish = ask(live, stream, tools=[WEATHER, NOW])
    assert (content or "", reasoning, finish) == (text, "", "tool_calls")
    ((id, name, arguments),) = calls
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Paris"})
    assert re.fullmatch(r"[a-zA-Z0-9]{9}" if parser == "mistral" else r"call_\w{24}", id)
    assert live.tokenizer.seen[0][1]["tools"] == [WEATHER, NOW]


@pytest.mark.parametrize("stream", [False, True])
def test_several_calls_and_one(serve: Any, stream: bool) -> None:
    live = serve('<tool_call>{"name": "now", "arguments": {}}</tool_call>\n' * 3 + " bye", "hermes")
    content, _, calls, finish = ask(live, stream, tools=[NOW])
    assert ([c[1] for c in calls], content, finish) == (["now"] * 3, "bye", "tool_calls")
    assert len({c[0] for c in calls}) == 3
    content, _, calls, finish = ask(live, stream, tools=[NOW], parallel_tool_calls=False)
    assert (len(calls), content or "", finish) == (1, "", "tool_calls")


class Endless(FakeEngine):
    """Goes on with spaces, until it is told to stop."""

    def _step(self, rid: str) -> Chunk:
        self._running[rid][1].append(32)
        return super()._step(rid)


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_more_is_generated_once_a_second_call_begins(serve: Any, stream: bool) -> None:
    live = serve('<tool_call>{"name": "now", "arguments": {}}</tool_call>\n' * 2, "hermes", engine=Endless)
    content, _, calls, finish = ask(live, stream, tools=[NOW], parallel_tool_calls=False)
    assert (len(calls), content or "", finish) == (1, "", "tool_calls")
    live.wait(lambda: live.engine.running == 0)
    assert len(live.engine.aborts) == 1


def test_streams_never_show_half_a_mark(serve: Any, paced: Any) -> None:
    live = serve('Wait <b> <tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>', "hermes", engine=paced)
    chunks = list(
        live.client.chat.completions.create(model="fake", messages=HELLO, tools=[NOW], stream=True, temperature=0)
    )
    text = ""
    for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
        assert "<t" not in text
        assert not text.endswith((" ", "> <"))
    assert text == "Wait <b>"
    arguments = [c.function.arguments for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
    assert len([a for a in arguments if a]) > 1
    assert "".join(arguments) == '{"a": 1}'


@pytest.mark.parametrize("stream", [False, True])
def test_none_and_no_tools(serve: Any, stream: bool) -> None:
    output = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    live = serve(output, "hermes")
    for body in ({}, {"tools": [NOW], "tool_choice": "none"}):
        assert ask(live, stream, **body) == (output, "", [], "stop")
    assert all("tools" not in kwargs for _, kwargs in live.tokenizer.seen)


@pytest.mark.parametrize("stream", [False, True])
def test_cut_off(serve: Any, stream: bool) -> None:
    live = serve('<tool_call>{"name": "now", "arguments": {"a": 123}}</tool_call>', "hermes")
    _, _, ((_, name, arguments),), finish = ask(live, stream, tools=[NOW], max_tokens=45)
    assert (name, arguments, finish) == ("now", '{"a": 1'[: len(arguments)], "length")
    assert arguments.startswith('{"a"')


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("parser", "output"),
    [
        ("qwen3", "<think>\nHm, so.\n</think>\n\nYes."),
        ("deepseek-r1", "Hm, so.\n</think>\n\nYes."),
        ("gpt-oss", "<|channel|>analysis<|message|>Hm, so.<|end|><|start|>assistant<|channel|>final<|message|>Yes."),
    ],
)
def test_reasoning(serve: Any, parser: str, output: str, stream: bool) -> None:
    live = serve(output, reasoning_parser=parser)
    assert ask(live, stream) == ("Yes.", "Hm, so.", [], "stop")
    usage = live.client.chat.completions.create(model="fake", messages=HELLO).usage
    assert 0 < usage.completion_tokens_details.reasoning_tokens < usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_and_call(serve: Any, stream: bool) -> None:
    output = 'Hm.</think>\n<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    live = serve(output, template="<tool_call> <think>")
    extra = {"chat_template_kwargs": {"tail": "<think>\n"}}
    content, reasoning, calls, finish = ask(live, stream, tools=[NOW], extra_body=extra)
    assert (content or "", reasoning, [c[1:] for c in calls], finish) == ("", "Hm.", [("now", "{}")], "tool_calls")
    extra = {"chat_template_kwargs": {"tail": "<think>\n\n</think>\n\n"}}
    content, reasoning, calls, _ = ask(live, stream, tools=[NOW], extra_body=extra)
    assert (content, reasoning, len(calls)) == ("Hm.</think>", "", 1)


def test_messages_reach_the_template(serve: Any) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": PARIS}}
    messages: list[Any] = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "assistant", "content": "Rain.", "reasoning_content": "wet"},
    ]
    for parser, arguments, content in (("hermes", {"city": "Paris"}, ""), ("deepseek", PARIS, None)):
        live = serve("ok", parser)
        assert ask(live, False, messages=messages, tools=[WEATHER])[0] == "ok"
        seen = live.tokenizer.seen[0][0]
        function = {"name": "get_weather", "arguments": arguments}
        assert seen[1] == {"role": "assistant", "content": content, "tool_calls": [call | {"function": function}]}
        assert seen[2] == {"role": "tool", "content": "rain", "tool_call_id": "call_1"}
        assert seen[3] == {"role": "assistant", "content": "Rain.", "reasoning_content": "wet"}


def test_harmony_calls_reasoning_thinking(serve: Any) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    for content, kept in ((None, {"thinking": "wet"}), ("Well.", {})):
        live = serve("<|channel|>final<|message|>ok", "gpt-oss", "gpt-oss")
        messages: list[Any] = [
            *HELLO,
            {"role": "assistant", "content": content, "reasoning_content": "wet", "tool_calls": [call]},
        ]
        assert ask(live, False, messages=messages, tools=[NOW])[0] == "ok"
        seen = live.tokenizer.seen[0][0][1]
        assert {k: v for k, v in seen.items() if "think" in k or "reason" in k} == kept


def test_reasoning_effort(serve: Any) -> None:
    live = serve("<|channel|>final<|message|>ok", template="<|channel|> reasoning_effort")
    assert ask(live, False, reasoning_effort="low")[0] == "ok"
    assert live.tokenizer.seen[0][1]["reasoning_effort"] == "low"
    with pytest.raises(openai.BadRequestError, match="reasoning_effort is 'most'; expected one of minimal, low"):
        ask(live, False, reasoning_effort="most")


def function(**more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | more}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [function(name="")]}, "tools[0].function.name"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name"),
        ({"tools": [function(), function()]}, "tools[1].function.name"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters.type"),
        ({"tools": [function(parameters={"properties": []})]}, "tools[0].function.parameters.properties"),
        ({"tools": [function(parameters={"properties": {"a": 5}})]}, "tools[0].function.parameters.properties.a"),
        ({"tools": [function(parameters={"required": "a"})]}, "tools[0].function.parameters.required"),
        ({"tools": [function(parameters={"required": [1]})]}, "tools[0].function.parameters.required"),
        ({"tools": [function(name=f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": [function()], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [function()], "tool_choice": {}}, "tool_choice"),
        ({"tools": [function()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools.mode"),
        ({"tools": [function()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [function()], "tool_choice": {"type": "function", "function": {"name": ["f"]}}}, "tool_choice"),
    ],
)
def test_wrong_tools(serve: Any, body: dict[str, Any], param: str) -> None:
    live = serve("ok", "hermes")
    status, error = live.error("/v1/chat/completions", {"messages": HELLO} | body)
    assert (status, error["param"]) == (400, param)
    assert ask(live, False, tools=[NOW])[0] == "ok"
