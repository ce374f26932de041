"""What the official client is used for, against a live server; `served` says on which device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
from served import SCHEMA, Process

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "The quick brown fox"}]}
FORM = {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "show", "parameters": SCHEMA}}


@pytest.fixture
def client(ending_server: Process) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=ending_server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_stream_says_what_the_whole_answer_does(client: Any) -> None:
    body = CHAT | {"max_completion_tokens": 12, "temperature": 0.0, "logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    (choice,) = whole.choices
    assert "".join(part.delta.content or "" for part in parts) == choice.message.content
    assert parts[-1].finish_reason == choice.finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 12
    entries = [entry for part in parts if part.logprobs for entry in part.logprobs.content]
    assert [e.token for e in entries] == [e.token for e in choice.logprobs.content]
    for entry in entries:
        best = [each.logprob for each in entry.top_logprobs]
        assert best == sorted(best, reverse=True)
        assert entry.logprob == pytest.approx(best[0], abs=1e-4)  # greedy


def test_choices_have_seeds_of_their_own(client: Any) -> None:
    body = CHAT | {"max_tokens": 12, "n": 3, "seed": 7, "extra_body": {"ignore_eos": True}}
    texts = [[c.message.content for c in client.chat.completions.create(**body).choices] for _ in range(2)]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


def test_stop_strings_and_biases(client: Any) -> None:
    def text(**more: Any) -> str:
        got = client.completions.create(model="tiny", prompt="x", max_tokens=6, temperature=0, **more)
        return "".join(chunk.choices[0].text for chunk in got) if more.get("stream") else got.choices[0].text

    letters = {"64": 50, "65": 49}  # a and b
    first = text(logit_bias=letters)
    assert first in ("aaaaaa", "bbbbbb")
    assert set(text(logit_bias=letters, frequency_penalty=2)) == {"a", "b"}
    assert text(logit_bias=letters, stop=[first[:2]], stream=True) == ""
    assert text(logit_bias=letters, stop=[first + "?"], stream=True) == first


def test_forms_and_calls(client: Any) -> None:
    for stream in (False, True):
        got = client.chat.completions.create(**CHAT, response_format=FORM, max_tokens=60, stream=stream)
        text = "".join(c.choices[0].delta.content or "" for c in got) if stream else got.choices[0].message.content
        jsonschema.validate(json.loads(text), SCHEMA)
    answer = client.chat.completions.create(**CHAT, tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "show"
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_responses(client: Any) -> None:
    form = {"format": {"type": "json_schema", "name": "p", "schema": SCHEMA}}
    body: dict[str, Any] = {"model": "tiny", "input": "a fox", "text": form, "max_output_tokens": 60}
    jsonschema.validate(json.loads(client.responses.create(**body).output_text), SCHEMA)
    events = list(client.responses.create(**body, stream=True))
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == events[-1].response.output_text
    jsonschema.validate(json.loads(said), SCHEMA)


def test_embeddings_models_and_errors(client: Any) -> None:
    one, other = client.embeddings.create(model="tiny", input=["a", "some longer text"]).data
    assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-3)
    assert one.embedding != other.embedding
    assert [m.id for m in client.models.list().data] == ["tiny"]
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**CHAT, top_p=7)
    assert error.value.param == "top_p"
