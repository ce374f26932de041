"""Embeddings, prompt logprobs, /tokenize, /detokenize and /health_generate over HTTP, with the fake engine."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from polyradix.serve.fake import FakeEngine

EMBED, NATIVE = "/v1/embeddings", "/generate"


@pytest.fixture(scope="module")
def embedder(make_live: Any) -> Iterator[Any]:
    with make_live(FakeEngine(), pooling="mean") as live:
        yield live


@pytest.mark.parametrize("given", ["abc", ["abc"], [1, 2, 3], [[1, 2, 3]]])
def test_embedding(embedder: Any, given: Any) -> None:
    answer = embedder.post(EMBED, {"input": given, "model": "fake"}).json()
    assert answer == {
        "data": [{"index": 0, "embedding": [3.0, 1.0, 0.5], "object": "embedding"}],
        "model": "fake",
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
        "object": "list",
    }


def test_base64_and_order(embedder: Any) -> None:
    texts = ["a" * n for n in range(1, 60)]
    answer = embedder.post(EMBED, {"input": texts, "encoding_format": "base64"}).json()
    assert [d["index"] for d in answer["data"]] == list(range(59))
    vectors = [struct.unpack("<3f", base64.b64decode(d["embedding"])) for d in answer["data"]]
    assert [v[0] for v in vectors] == list(range(1, 60))


def test_the_official_client(embedder: Any) -> None:
    with openai.OpenAI(base_url=embedder.url + "/v1", api_key="x") as client:
        found = client.embeddings.create(model="fake", input=["abc", "abcd"])  # asks for base64 by itself
    assert [list(d.embedding) for d in found.data] == [[3.0, 1.0, 0.5], [4.0, 1.0, 0.5]]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [300]}, "input"),
        ({"input": ["a", 5]}, "input"),
        ({"input": "x" * 257}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "x", "dimensions": 5}, "dimensions"),
    ],
)
def test_wrong_embedding_requests(embedder: Any, body: dict[str, Any], param: str) -> None:
    status, error = embedder.error(EMBED, body)
    assert status == 400
    assert error["param"].startswith(param)
    assert embedder.error(EMBED, {"input": "x", "model": "other"})[0] == 404
    assert embedder.post(EMBED, {"input": "x" * 256}).status_code == 200


def test_embeddings_have_to_be_asked_for(live: Any) -> None:
    status, error = live.error(EMBED, {"input": "x"})
    assert (status, "--embeddings" in error["message"]) == (400, True)


def test_the_engines_refusal(make_live: Any) -> None:
    with make_live(FakeEngine(refuse="no room"), pooling="last") as live:
        assert live.error(EMBED, {"input": "x"})[1]["message"] == "no room"


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_logprobs(live: Any, stream: bool) -> None:
    body = {"input_ids": [5, 6, 7], "prompt_logprobs": 1, "stream": stream}
    response = live.post(NATIVE, body)
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        assert all("prompt_logprobs" not in event for event in events[1:])
        ids = [token for event in events for token in event["output_ids"]]
    else:
        events = [response.json()]
        ids = events[0]["output_ids"]
    assert ids == [5, 6, 7]
    assert events[0]["prompt_logprobs"] == [None, [-0.5, [[97, -1.0]]], [-0.5, [[97, -1.0]]]]
    assert "prompt_logprobs" not in live.post(NATIVE, {"input_ids": [5]}).json()
    for wrong in (-1, 21, True):
        status, error = live.error(NATIVE, body | {"prompt_logprobs": wrong})
        assert (status, error["param"]) == (400, "prompt_logprobs")


def test_prompt_logprobs_alone(live: Any) -> None:
    body = {"input_ids": [5, 6, 7], "prompt_logprobs": 0, "max_tokens": 0, "logprobs": 1}
    answer = live.post(NATIVE, body).json()
    assert answer["prompt_logprobs"] == [None, [-0.5, []], [-0.5, []]]
    assert (answer["output_ids"], answer["logprobs"], answer["finish_reason"]) == ([], [], "length")
    assert answer["usage"]["completion_tokens"] == 0
    assert live.error(NATIVE, {"input_ids": [5], "max_tokens": 0})[1]["param"] == "max_tokens"


def test_hanging_up_ends_reads(make_live: Any) -> None:
    class Mute(FakeEngine):
        def _read(self, read: Any) -> None:
            reads.append(read.rid)

    reads: list[str] = []
    with make_live(Mute(), pooling="last") as live:
        live.hang_up(EMBED, {"input": ["a", "b"]}, lambda: len(reads) == 2)
        live.hang_up(NATIVE, {"input_ids": [5, 6], "prompt_logprobs": 0}, lambda: len(reads) == 3)
        live.wait(lambda: len(live.engine.aborts) == 3)
        assert sorted(live.engine.aborts) == sorted(reads)
        assert live.server.client._calls == {}


def test_an_embedding_has_no_output_to_make_room_for(embedder: Any) -> None:
    message = embedder.error(EMBED, {"input": "x" * 257})[1]["message"]
    assert message == "the prompt has 257 tokens; that is more than the context of 256 tokens"


def test_tokenize(live: Any) -> None:
    assert live.post("/tokenize", {"prompt": "hé", "return_token_strs": True}).json() == {
        "count": 3,
        "max_model_len": 256,
        "tokens": list("hé".encode()),
        "token_strs": ["h", "\ufffd", "\ufffd"],
    }
    messages = {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"z": 1}}
    messages |= {"add_generation_prompt": True}
    answer = live.post("/tokenize", messages).json()
    text = live.post("/detokenize", {"tokens": answer["tokens"]}).json()
    assert text == {"prompt": "user: hi\nadd_generation_prompt=Truez=1"}
    assert answer["token_strs"] is None
    assert live.post("/tokenize", {"prompt": ""}).json()["tokens"] == []
    wrong = [
        {},
        {"prompt": "x", "messages": []},
        {"prompt": 5},
        {"messages": []},
        {"messages": [{"role": "assistant", "content": "x"}]},
    ]
    for body in wrong:
        assert live.error("/tokenize", body)[0] == 400


def test_detokenize(live: Any) -> None:
    assert live.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    for tokens in ([257], [-1], [10**30], ["a"], 5, [1.5], [True]):
        status, error = live.error("/detokenize", {"tokens": tokens})
        assert (status, error["param"].startswith("tokens")) == (400, True)
    for path, body in (("/tokenize", {"prompt": "x"}), ("/detokenize", {"tokens": []})):
        assert live.error(path, body | {"model": "other"})[0] == 404


def test_health_generate(live: Any, make_live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert live.http.get("/health_generate").json() == {"status": "ok", "max_context": 256}
    monkeypatch.setattr("polyradix.serve.text.HEALTH_SECONDS", 0.1)
    with make_live(FakeEngine(step_seconds=1.0)) as slow:
        response = slow.http.get("/health_generate")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
        slow.wait(lambda: len(slow.engine.aborts) == 1)
        slow.engine.die()
        slow.wait(lambda: slow.http.get("/health_generate").json()["error"]["message"] == "the fake engine ended")
