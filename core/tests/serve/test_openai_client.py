"""What the official client sees. The fake engine answers with the prompt itself, one byte a token."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from polyradix.serve.fake import FakeEngine


@pytest.fixture
def client(live: Any) -> Any:
    with openai.OpenAI(base_url=live.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def test_chat(client: Any) -> None:
    answer = client.chat.completions.create(model="fake", messages=chat("grüße"))
    assert answer.object == "chat.completion"
    assert answer.model == "fake"
    assert answer.id.startswith("chatcmpl-")
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "stop")
    assert choice.message.content == "user: grüße\n"
    assert choice.logprobs is None
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == len("user: grüße\n".encode())
    assert answer.usage.total_tokens == 2 * answer.usage.prompt_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    again = client.chat.completions.create(model="fake", messages=chat("grüße"))
    assert again.usage.prompt_tokens_details.cached_tokens == answer.usage.prompt_tokens


def test_chat_stream(client: Any) -> None:
    chunks = list(
        client.chat.completions.create(
            model="fake", messages=chat("grüße 🙂"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(c.choices[0].delta.role is None for c in chunks[1:-1])
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "user: grüße 🙂\n"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len("user: grüße 🙂\n".encode())


def test_stream_without_usage(live: Any, client: Any) -> None:
    body = {"prompt": "abc", "stream": True}
    lines = [line for line in live.post("/v1/completions", body).text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    assert all('"usage"' not in line for line in lines)


def test_content_parts_and_developer(client: Any) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages: list[Any] = [{"role": "developer", "content": "x"}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="fake", messages=messages)
    assert answer.choices[0].message.content == "system: x\nuser: ab\n"


def test_template_kwargs(client: Any) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    answer = client.chat.completions.create(model="fake", messages=chat("x"), extra_body=extra)
    assert answer.choices[0].message.content == "user: x\nenable_thinking=False"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(client: Any, field: str) -> None:
    answer = client.chat.completions.create(model="fake", messages=chat("hello"), **{field: 4})
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("user", "length")
    assert answer.usage.completion_tokens == 4


def test_chat_default_fills_the_context(live: Any, client: Any) -> None:
    client.chat.completions.create(model="fake", messages=chat("hello"))
    client.chat.completions.create(model="fake", messages=chat("hello"), max_tokens=10**30)
    client.completions.create(model="fake", prompt="hello")
    room = 256 - len("user: hello\n")
    assert [s.params.max_tokens for s in live.engine.submits] == [room, room, 16]


def test_completion(client: Any) -> None:
    answer = client.completions.create(model="fake", prompt="0123456789abcdefXYZ")
    assert answer.object == "text_completion"
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("0123456789abcdef", "length")


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), (["ab", "cd"], ["ab", "cd"]), ([97, 98], ["ab"]), ([[97], [98, 99]], ["a", "bc"])],
)
@pytest.mark.parametrize("stream", [False, True])
def test_prompt_forms_and_n(client: Any, prompt: Any, texts: list[str], stream: bool) -> None:
    got = client.completions.create(model="fake", prompt=prompt, n=2, stream=stream)
    out = [""] * (2 * len(texts))
    for chunk in got if stream else [got]:
        for choice in chunk.choices:
            out[choice.index] += choice.text
    assert out == [text for text in texts for _ in range(2)]
    if not stream:
        assert got.usage.prompt_tokens == sum(map(len, texts))
        assert got.usage.completion_tokens == 2 * sum(map(len, texts))


def test_seeds_differ_between_choices(live: Any, client: Any) -> None:
    client.completions.create(model="fake", prompt="ab", n=3, seed=2**63 - 2)
    assert [s.params.seed for s in live.engine.submits] == [2**63 - 2, 2**63 - 1, -(2**63)]


def test_sampling_reaches_the_engine(live: Any, client: Any) -> None:
    extra = {"top_k": 5, "min_p": 0.25, "stop_token_ids": [7], "ignore_eos": True}
    client.completions.create(
        model="fake", prompt="x", temperature=0.5, top_p=0.75, seed=3, max_tokens=9, user="u", extra_body=extra
    )
    client.completions.create(model="fake", prompt="x")
    first, second = (s.params for s in live.engine.submits)
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.5, 0.75, 5, 0.25)
    assert (first.seed, first.max_tokens, first.stop_token_ids, first.ignore_eos) == (3, 9, (7,), True)
    assert (second.temperature, second.top_p, second.seed, second.stop_token_ids) == (1.0, 1.0, None, (256,))


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_does_not_leak(live: Any, client: Any, stream: bool) -> None:
    got = client.completions.create(
        model="fake", prompt="one STP two STOP three", max_tokens=50, stop=["STOP", "never"], stream=stream, logprobs=1
    )
    chunks = list(got) if stream else [got]
    assert "".join(c.choices[0].text for c in chunks) == "one STP two "
    assert chunks[-1].choices[0].finish_reason == "stop"
    tokens = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.tokens]
    assert "".join(tokens) == "one STP two "
    if stream:  # nothing of a stop string is out before it is clear that it is none
        text = ""
        for chunk in chunks:
            text += chunk.choices[0].text
            assert not text.endswith(("S", "ST"))


def test_stop_token_text_is_not_shown_but_counted(client: Any) -> None:
    answer = client.completions.create(
        model="fake", prompt="abcd", logprobs=0, extra_body={"stop_token_ids": [ord("c")]}
    )
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "stop")
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].logprobs.tokens == ["a", "b"]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: Any, stream: bool) -> None:
    got = client.chat.completions.create(
        model="fake", messages=chat("ü"), logprobs=True, top_logprobs=2, stream=stream, stop="\n"
    )
    chunks = list(got) if stream else [got]
    content = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert bytes(b for entry in content for b in entry.bytes) == "user: ü".encode()
    assert content[0].token == "u"
    assert content[0].logprob == -0.5
    assert content[-1].token == "\ufffd"
    assert [(t.token, t.logprob, t.bytes) for t in content[0].top_logprobs] == [("a", -1.0, [97]), ("b", -2.0, [98])]


def test_completion_logprobs(client: Any) -> None:
    answer = client.completions.create(model="fake", prompt="hü", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["h", "bytes:\\xc3", "bytes:\\xbc"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.text_offset == [0, 1, 11]
    assert logprobs.top_logprobs[0] == {"a": -1.0, "b": -2.0, "h": -0.5}
    none = client.completions.create(model="fake", prompt="h", logprobs=0).choices[0].logprobs
    assert (none.tokens, none.top_logprobs) == (["h"], None)


def test_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("fake", "model", "polyradix")
    assert client.models.retrieve("fake") == model
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other/model")
    assert error.value.code == "model_not_found"


def test_errors_have_the_clients_types(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-5", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="fake", prompt="x", temperature=3)
    assert bad.value.param == "temperature"


def test_penalties_reach_the_engine(live: Any, client: Any) -> None:
    fields = {"frequency_penalty": 0.5, "presence_penalty": -1.0, "logit_bias": {"65": 2, "7": -100}}
    extra = {"repetition_penalty": 1.25, "min_tokens": 3}
    client.completions.create(model="fake", prompt="x", extra_body=extra, **fields)
    client.chat.completions.create(model="fake", messages=chat("x"), extra_body=extra, **fields)
    for params in (s.params for s in live.engine.submits):
        assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (0.5, -1.0, 1.25)
        assert (params.logit_bias, params.min_tokens) == ({65: 2.0, 7: -100.0}, 3)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["grüße", "ab"])
def test_echo(client: Any, prompt: str, stream: bool) -> None:
    got = client.completions.create(
        model="fake", prompt=[prompt, "cd"], echo=True, max_tokens=1, stop="q", stream=stream
    )
    texts = ["", ""]
    for chunk in got if stream else [got]:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [prompt + prompt[0], "cdc"]


def test_echo_alone(client: Any) -> None:
    answer = client.completions.create(model="fake", prompt=[97, 98], echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("ab", "length")
    assert answer.usage.completion_tokens == 0


def test_best_of(make_live: Any) -> None:
    """The engine's answers: seed s gives s tokens more likely the higher s is; the best have the highest mean."""
    worth = {10: -3.0, 11: -0.5, 12: -2.0, 13: -1.0}

    class Engine(FakeEngine):
        def _step(self, rid: str) -> Any:
            seed = self._running[rid][0].params.seed
            chunk = super()._step(rid)
            for entry in chunk.logprobs or []:
                entry.logprob = worth[seed]
            return chunk

    with (
        make_live(Engine(lambda s: [97 + s.params.seed - 10] * (s.params.seed - 9))) as live,
        openai.OpenAI(base_url=live.url + "/v1", api_key="x") as client,
    ):
        answer = client.completions.create(model="fake", prompt="x", n=2, best_of=4, seed=10)
        assert [(c.index, c.text, c.logprobs) for c in answer.choices] == [(0, "bb", None), (1, "dddd", None)]
        assert answer.usage.completion_tokens == 1 + 2 + 3 + 4
