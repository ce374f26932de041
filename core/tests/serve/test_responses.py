"""The Responses API through the official client: canned outputs behind a live server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyradix.serve.fake import ByteTokenizer, FakeEngine

PATH = "/v1/responses"
NOW = {"type": "function", "name": "now", "description": "The time", "parameters": {"type": "object"}}


class Seen(ByteTokenizer):
    def __init__(self) -> None:
        self.seen: list[tuple[list[dict[str, Any]], dict[str, Any]]] = []

    def chat_prompt(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        self.seen.append((messages, kwargs))
        return "prompt"


@pytest.fixture
def serve(make_live: Any) -> Iterator[Callable[..., Any]]:
    with contextlib.ExitStack() as stack:

        def serve(output: str, tool_parser: str = "hermes", reasoning_parser: str = "none", **options: Any) -> Any:
            engine = FakeEngine(lambda _: list(output.encode()), max_context=4096, **options)
            parsers = {"tool_parser": tool_parser, "reasoning_parser": reasoning_parser}
            live = stack.enter_context(make_live(engine, Seen(), **parsers))
            client = openai.OpenAI(base_url=live.url + "/v1", api_key="x", max_retries=0)
            live.client = stack.enter_context(client)
            live.seen = live.server.tokenizer.seen
            return live

        yield serve


def ask(live: Any, stream: bool, **body: Any) -> Any:
    """The response. A stream's last event has it; everything in it was said by events before."""
    body = {"model": "fake", "input": "hi"} | body
    if not stream:
        return live.client.responses.create(**body)
    events = list(live.client.responses.create(stream=True, **body))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert [e.type for e in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.status == "in_progress"
    done = events[-1].response
    assert events[-1].type == f"response.{done.status}"
    assert [e.item for e in events if e.type == "response.output_item.done"] == done.output
    added = [e.item for e in events if e.type == "response.output_item.added"]
    assert [(i.id, i.type, i.status) for i in added] == [(i.id, i.type, "in_progress") for i in done.output]
    for n, item in enumerate(done.output):
        mine = [e for e in events if getattr(e, "output_index", None) == n]
        deltas = "".join(e.delta for e in mine if e.type.endswith(".delta"))
        assert {e.item_id for e in mine if hasattr(e, "item_id")} == {item.id}
        if item.type == "function_call":
            assert deltas == item.arguments
            (last,) = [e for e in mine if e.type == "response.function_call_arguments.done"]
            assert (last.arguments, last.name) == (item.arguments, item.name)
        else:
            assert deltas == item.content[0].text
            kind = "response.reasoning_text.done" if item.type == "reasoning" else "response.output_text.done"
            (last,) = [e for e in mine if e.type == kind]
            assert last.text == deltas
    return done


@pytest.mark.parametrize("stream", [False, True])
def test_text(serve: Any, stream: bool) -> None:
    live = serve("grüße 🙂")
    got = ask(live, stream, instructions="Be kind.", temperature=0.5, metadata={"a": "b"})
    assert (got.object, got.status, got.model, got.output_text) == ("response", "completed", "fake", "grüße 🙂")
    assert (got.instructions, got.temperature, got.metadata) == ("Be kind.", 0.5, {"a": "b"})
    assert got.id.startswith("resp_")
    (item,) = got.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert (got.usage.input_tokens, got.usage.output_tokens, got.usage.total_tokens) == (6, 12, 18)
    assert live.seen[0] == ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}], {})
    assert live.engine.submits[0].params.temperature == 0.5


@pytest.mark.parametrize("stream", [False, True])
def test_cut_off(serve: Any, stream: bool) -> None:
    got = ask(serve("0123456789"), stream, max_output_tokens=4)
    assert (got.status, got.output_text, got.output[0].status) == ("incomplete", "0123", "incomplete")
    assert got.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_nothing(serve: Any, stream: bool) -> None:
    got = ask(serve(""), stream)
    assert (got.status, got.output_text, len(got.output)) == ("completed", "", 1)


@pytest.mark.parametrize("stream", [False, True])
def test_calls_and_reasoning(serve: Any, stream: bool) -> None:
    output = '<think>Hm.</think>Wait.<tool_call>{"name": "now", "arguments": {"a": 1}}</tool_call>'
    live = serve(output + output[output.index("<tool") :], reasoning_parser="qwen3")
    got = ask(live, stream, tools=[NOW], parallel_tool_calls=True)
    assert [item.type for item in got.output] == ["reasoning", "message", "function_call", "function_call"]
    thought, message, *calls = got.output
    assert (thought.content[0].text, message.content[0].text) == ("Hm.", "Wait.")
    assert [(c.name, c.arguments, c.status) for c in calls] == [("now", '{"a": 1}', "completed")] * 2
    assert calls[0].call_id != calls[1].call_id
    assert got.usage.output_tokens_details.reasoning_tokens == len("Hm.</think>")
    function = {name: value for name, value in NOW.items() if name != "type"}
    assert live.seen[0][1] == {"tools": [{"type": "function", "function": function}]}
    assert got.tools[0].name == "now"


def test_items_become_messages(serve: Any) -> None:
    live = serve("ok")
    items: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}],
        },
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "1", "name": "now", "arguments": '{"a": 1}'},
        {"type": "function_call", "call_id": "2", "name": "now", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "noon"},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "Noon.", "annotations": []}],
        },
    ]
    assert ask(live, False, input=items, tools=[NOW]).output_text == "ok"

    def call(id: str, arguments: dict[str, int]) -> dict[str, Any]:
        return {"id": id, "type": "function", "function": {"name": "now", "arguments": arguments}}

    calls = [call("1", {"a": 1}), call("2", {})]
    assert live.seen[0][0] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": calls},
        {"role": "tool", "content": "noon", "tool_call_id": "1"},
        {"role": "assistant", "content": "Noon."},
    ]


def test_an_answer_is_good_input(serve: Any) -> None:
    live = serve('<tool_call>{"name": "now", "arguments": {}}</tool_call>')
    first = ask(live, False, tools=[NOW])
    items = [{"role": "user", "content": "hi"}, *[item.model_dump() for item in first.output]]
    items.append({"type": "function_call_output", "call_id": first.output[0].call_id, "output": "noon"})
    ask(live, False, input=items, tools=[NOW])
    assert [m["role"] for m in live.seen[1][0]] == ["user", "assistant", "tool"]


def test_formats_and_choices_reach_the_engine(serve: Any) -> None:
    live = serve("{}")
    form = {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}
    ask(live, False, text={"format": form})
    ask(live, False, text={"format": {"type": "json_object"}})
    ask(live, False, text={"format": {"type": "text"}})
    ask(live, False, tools=[NOW], tool_choice={"type": "function", "name": "now"})
    schema, thing, none, call = (s.params.grammar for s in live.engine.submits)
    assert (schema.kind, schema.source, schema.field) == ("json_schema", '{"type": "object"}', "text.format.schema")
    assert (thing.kind, none, call.kind) == ("json_object", None, "lark")


def test_only_allowed_tools_are_offered(serve: Any) -> None:
    live = serve('<tool_call>{"name": "then", "arguments": {}}</tool_call>')
    tools = [NOW, NOW | {"name": "then"}]
    for mode in ("auto", "required"):
        choice = ALLOWED | {"mode": mode, "tools": [{"type": "function", "name": "then"}]}
        got = ask(live, False, tools=tools, tool_choice=choice)
        assert got.tool_choice.model_dump() == choice
        assert len(got.tools) == 2
    assert [tool["function"]["name"] for _, said in live.seen for tool in said["tools"]] == ["then"] * 2
    auto, required = (submit.params.grammar for submit in live.engine.submits)
    assert auto is None
    assert "then" in required.source
    assert "now" not in required.source


ALLOWED = {"type": "allowed_tools", "mode": "auto"}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": 5}, "input"),
    ({"input": []}, "input"),
    ({"input": [5]}, "input[0]"),
    ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 5}]}]}, "input[0].content[0].text"),
    ({"input": [{"type": "computer_call"}]}, "input[0].type"),
    ({"input": [{"type": "function_call", "call_id": "1", "name": "f"}]}, "input[0].arguments"),
    ({"input": [{"type": "function_call", "call_id": "1", "name": "f", "arguments": "x"}]}, "input"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
    ({"input": "x" * 5000}, "input"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": "5"}, "max_output_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].name"),
    ({"tools": [NOW | {"parameters": {"type": "array"}}]}, "tools[0].parameters.type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": {"type": "web_search"}}, "tool_choice"),
    ({"tools": [NOW], "tool_choice": {"type": "allowed_tools", "tools": [NOW]}}, "tool_choice.mode"),
    ({"tools": [NOW], "tool_choice": ALLOWED | {"tools": [{"type": "function", "name": "x"}]}}, "tool_choice.tools"),
    ({"tools": [NOW], "tool_choice": ALLOWED | {"tools": 5}}, "tool_choice.tools"),
    ({"text": {"format": 5}}, "text.format"),
    ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"store": True}, "store"),
    ({"background": True}, "background"),
    ({"model": "gpt-5"}, "model"),
]


@pytest.fixture(scope="module")
def plain(make_live: Any) -> Iterator[Any]:
    with make_live(FakeEngine(max_context=4096), Seen(), tool_parser="hermes") as live:
        yield live


@pytest.mark.parametrize(("body", "param"), WRONG)
def test_wrong_value(plain: Any, body: dict[str, Any], param: str) -> None:
    if body.get("input") == "x" * 5000:
        plain.server.tokenizer.chat_prompt = lambda messages, **_: messages[0]["content"]
    status, error = plain.error(PATH, {"input": "x"} | body)
    assert (status, error["param"]) == (404 if "model" in body else 400, param)
    assert param.split("[")[0].split(".")[0] in error["message"] or param == "input"


def test_a_stream_that_breaks_names_this_apis_field(serve: Any) -> None:
    live = serve("x", refuse="too many tokens")
    with pytest.raises(openai.BadRequestError, match="too many tokens"):
        ask(live, True)


SCALAR = st.sampled_from(
    [None, True, 5, "x", "{}", "function", "user", "message", "input_text", "function_call", "reasoning"]
)
NAMES = st.sampled_from(["type", "role", "content", "text", "call_id", "name", "arguments", "output", "parameters"])
THING = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=5))


@settings(max_examples=150)
@given(items=st.lists(THING, max_size=3), tools=st.lists(THING, max_size=2))
def test_never_a_500(plain: Any, items: list[Any], tools: list[Any]) -> None:
    reply = plain.post(PATH, {"input": items, "tools": tools})
    assert reply.status_code in (200, 400), reply.text
    reply = plain.post("/v1/chat/completions", {"messages": [*items, {"role": "user", "content": "x"}], "tools": tools})
    assert reply.status_code in (200, 400), reply.text
