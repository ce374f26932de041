"""Whatever a client sends gets OpenAI's error object, the right status, the field's name; and the server goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyradix.serve import errors
from polyradix.serve.fake import FakeEngine

CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
def alive(live: Any) -> Iterator[Any]:
    """The server must still answer after the test."""
    yield live
    assert live.post(TEXT, {"prompt": "ok"}).json()["choices"][0]["text"] == "ok"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"prompt": "a" "b"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "zz": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "x", "max_tokens": ' + b"9" * 100_000 + b"}",
        b"[1]",
        b'"prompt"',
        b"null",
    ],
)
def test_not_json(alive: Any, body: bytes) -> None:
    response = alive.http.post(TEXT, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert "body is not" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "\xff"]
)
def test_content_type(alive: Any, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind.encode("latin-1")}
    response = alive.http.post(TEXT, content=b'{"prompt": "x"}', headers=headers)
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


def test_content_type_with_charset(alive: Any) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert alive.http.post(TEXT, content=b'{"prompt": "x"}', headers=headers).status_code == 200


SCHEMA = {"type": "object"}
STRUCTURED: list[tuple[str, Any, str]] = [
    ("response_format", 5, "response_format"),
    ("response_format", {}, "response_format.type"),
    ("response_format", {"type": ["text"]}, "response_format.type"),
    ("response_format", {"type": "yaml"}, "response_format.type"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
    ("response_format", {"type": "json_schema", "json_schema": SCHEMA}, "response_format.json_schema.schema"),
    ("response_format", {"type": "regex"}, "response_format.regex"),
    ("response_format", {"type": "regex", "regex": "a" * 70_000}, "response_format.regex"),
    ("response_format", {"type": "grammar", "grammar": 5}, "response_format.grammar"),
    ("structured_outputs", {"structural_tag": "{"}, "structured_outputs.structural_tag"),
    ("structured_outputs", {"structural_tag": [1]}, "structured_outputs.structural_tag"),
    ("structured_outputs", "x", "structured_outputs"),
    ("structured_outputs", {}, "structured_outputs"),
    ("structured_outputs", {"regex": "a", "choice": ["a"]}, "structured_outputs"),
    ("structured_outputs", {"json": 5}, "structured_outputs.json"),
    ("structured_outputs", {"json_object": False}, "structured_outputs.json_object"),
    ("structured_outputs", {"choice": "ab"}, "structured_outputs.choice"),
]
STRUCTURED_ON: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": HELLO}),
    (TEXT, {"prompt": "x"}),
    (NATIVE, {"input_ids": [1]}),
]
WRONG: list[tuple[str, dict[str, Any], str]] = [
    (TEXT, {}, "prompt"),
    (TEXT, {"prompt": None}, "prompt"),
    (TEXT, {"prompt": 5}, "prompt"),
    (TEXT, {"prompt": {}}, "prompt"),
    (TEXT, {"prompt": []}, "prompt"),
    (TEXT, {"prompt": ""}, "prompt"),
    (TEXT, {"prompt": [""]}, "prompt"),
    (TEXT, {"prompt": [[]]}, "prompt"),
    (TEXT, {"prompt": [-1]}, "prompt"),
    (TEXT, {"prompt": [257]}, "prompt"),
    (TEXT, {"prompt": [10**30]}, "prompt"),
    (TEXT, {"prompt": [1.5]}, "prompt[0]"),
    (TEXT, {"prompt": ["a"] * 1000, "n": 2}, "prompt"),
    (TEXT, {"prompt": "x", "max_tokens": 0}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": -(10**30)}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": "5"}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": True}, "max_tokens"),
    (TEXT, {"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
    (TEXT, {"prompt": "x", "temperature": -0.1}, "temperature"),
    (TEXT, {"prompt": "x", "temperature": 2.1}, "temperature"),
    (TEXT, {"prompt": "x", "temperature": "hot"}, "temperature"),
    (TEXT, {"prompt": "x", "temperature": 10**400}, "temperature"),
    (TEXT, {"prompt": "x", "top_p": 0}, "top_p"),
    (TEXT, {"prompt": "x", "top_p": 1.01}, "top_p"),
    (TEXT, {"prompt": "x", "top_k": -2}, "top_k"),
    (TEXT, {"prompt": "x", "top_k": 2**31}, "top_k"),
    (TEXT, {"prompt": "x", "min_p": 2}, "min_p"),
    (TEXT, {"prompt": "x", "seed": 2**63}, "seed"),
    (TEXT, {"prompt": "x", "seed": 0.5}, "seed"),
    (TEXT, {"prompt": "x", "n": 0}, "n"),
    (TEXT, {"prompt": "x", "n": 129}, "n"),
    (TEXT, {"prompt": "x", "logprobs": 21}, "logprobs"),
    (TEXT, {"prompt": "x", "logprobs": -1}, "logprobs"),
    (TEXT, {"prompt": "x", "logprobs": True}, "logprobs"),
    (TEXT, {"prompt": "x", "stop": ""}, "stop"),
    (TEXT, {"prompt": "x", "stop": ["a"] * 33}, "stop"),
    (TEXT, {"prompt": "x", "stop": ["a", ""]}, "stop"),
    (TEXT, {"prompt": "x", "stop": 5}, "stop"),
    (TEXT, {"prompt": "x", "stop": ["a", 5]}, "stop[1]"),
    (TEXT, {"prompt": "x", "stop_token_ids": [257]}, "stop_token_ids"),
    (TEXT, {"prompt": "x", "stop_token_ids": 5}, "stop_token_ids"),
    (TEXT, {"prompt": "x", "stream": "yes"}, "stream"),
    (TEXT, {"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
    (TEXT, {"prompt": "x", "stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    (TEXT, {"prompt": "x", "echo": 1}, "echo"),
    (TEXT, {"prompt": "x", "best_of": 0}, "best_of"),
    (TEXT, {"prompt": "x", "best_of": 1, "n": 2}, "best_of"),
    (TEXT, {"prompt": "x", "best_of": 129}, "best_of"),
    (TEXT, {"prompt": "x", "best_of": 2, "stream": True}, "best_of"),
    (TEXT, {"prompt": ["x"] * 600, "best_of": 2}, "prompt"),
    (TEXT, {"prompt": "x", "suffix": "y"}, "suffix"),
    (TEXT, {"prompt": "x", "frequency_penalty": 2.1}, "frequency_penalty"),
    (TEXT, {"prompt": "x", "repetition_penalty": 0}, "repetition_penalty"),
    (TEXT, {"prompt": "x", "min_tokens": 17}, "min_tokens"),
    (TEXT, {"prompt": "x", "min_tokens": -1}, "min_tokens"),
    (TEXT, {"prompt": "x", "logit_bias": {"257": 1}}, "logit_bias"),
    (TEXT, {"prompt": "x", "logit_bias": {"-1": 1}}, "logit_bias"),
    (TEXT, {"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias"),
    (TEXT, {"prompt": "x", "logit_bias": {"1": 100.5}}, "logit_bias"),
    (TEXT, {"prompt": "x", "logit_bias": {"1": "5"}}, "logit_bias.1"),
    (TEXT, {"prompt": "x", "logit_bias": [1]}, "logit_bias"),
    (TEXT, {"prompt": "x", "model": 5}, "model"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "hi"}, "messages"),
    (CHAT, {"messages": ["hi"]}, "messages[0]"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (CHAT, {"messages": [*HELLO, {"role": "king", "content": "x"}]}, "messages[1].role"),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, "messages[0].tool_calls[0]"),
    (CHAT, {"messages": [{"role": "assistant"}]}, "messages[0].content"),
    (CHAT, {"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content"),
    *[
        (
            CHAT,
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [called]}]},
            f"messages[1].tool_calls[0].{field}",
        )
        for called, field in (
            ({"type": "function", "function": {"name": "f", "arguments": "{}"}}, "id"),
            ({"id": "1", "type": "x", "function": {"name": "f", "arguments": "{}"}}, "type"),
            ({"id": "1", "type": "function", "function": {"arguments": "{}"}}, "function.name"),
            ({"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}, "function.arguments"),
            ({"id": "1", "type": "function", "function": {"name": "f", "arguments": "[1]"}}, "function.arguments"),
            (
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 10**5}},
                "function.arguments",
            ),
        )
    ],
    (CHAT, {"messages": [{"role": "assistant", "content": "refused by the template"}]}, "messages"),
    (CHAT, {"messages": HELLO, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (CHAT, {"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens"),
    (CHAT, {"messages": HELLO, "logprobs": 1}, "logprobs"),
    (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    (CHAT, {"messages": HELLO, "tools": {}}, "tools"),
    (CHAT, {"messages": HELLO, "tools": [{}]}, "tools[0].type"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function"),
    (CHAT, {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    (CHAT, {"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
    (CHAT, {"messages": HELLO, "tool_choice": "any"}, "tool_choice"),
    (CHAT, {"messages": HELLO, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    (CHAT, {"messages": HELLO, "reasoning_effort": "high"}, "reasoning_effort"),
    *[(path, body | {field: value}, param) for field, value, param in STRUCTURED for path, body in STRUCTURED_ON],
    (CHAT, {"messages": HELLO, "presence_penalty": -3}, "presence_penalty"),
    (CHAT, {"messages": HELLO, "modalities": ["audio"]}, "modalities"),
    (CHAT, {"messages": HELLO, "continue_final_message": True}, "continue_final_message"),
    (CHAT, {"messages": HELLO, "add_generation_prompt": 1}, "add_generation_prompt"),
    (CHAT, {"messages": HELLO, "chat_template": "{{ 1 }}"}, "chat_template"),
    (CHAT, {"messages": HELLO, "separate_reasoning": False}, "separate_reasoning"),
    *[
        (path, body | {field: value}, param)
        for field, value, param in (
            ("guided_json", 5, "guided_json"),
            ("guided_choice", "ab", "guided_choice"),
            ("ebnf", 5, "ebnf"),
            ("truncate_prompt_tokens", 0, "truncate_prompt_tokens"),
            ("truncate_prompt_tokens", -2, "truncate_prompt_tokens"),
            ("skip_special_tokens", 1, "skip_special_tokens"),
            ("allowed_token_ids", [5], "allowed_token_ids"),
            ("bad_words", ["a"], "bad_words"),
            ("use_beam_search", True, "use_beam_search"),
        )
        for path, body in STRUCTURED_ON
    ],
    (TEXT, {"prompt": "x", "guided_regex": "a", "regex": "a"}, "regex"),
    (TEXT, {"prompt": "x", "prompt_logprobs": 1}, "prompt_logprobs"),
    (NATIVE, {"text": "x", "input_ids": [1]}, "text"),
    (NATIVE, {"text": ""}, "text"),
    (NATIVE, {"text": ["x"]}, "text"),
    (NATIVE, {"text": "x", "prompt_logprobs": 1}, "prompt_logprobs"),
    (NATIVE, {"text": "x", "sampling_params": [1]}, "sampling_params"),
    (NATIVE, {"text": "x", "sampling_params": {"n": 2}}, "sampling_params.n"),
    (NATIVE, {"text": "x", "sampling_params": {"max_new_tokens": "5"}}, "sampling_params.max_new_tokens"),
    (NATIVE, {"text": "x", "sampling_params": {"stop_regex": "a"}}, "stop_regex"),
    (NATIVE, {"input_ids": [1], "return_logprob": True, "logprob_start_len": 0}, "logprob_start_len"),
    (NATIVE, {}, "input_ids"),
    (NATIVE, {"input_ids": []}, "input_ids"),
    (NATIVE, {"input_ids": "abc"}, "input_ids"),
    (NATIVE, {"input_ids": [257]}, "input_ids"),
    (NATIVE, {"input_ids": [1], "logprobs": 21}, "logprobs"),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_wrong_value(alive: Any, path: str, body: dict[str, Any], param: str) -> None:
    status, error = alive.error(path, body)
    assert status == 400
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split("[")[0].split(".")[0] in error["message"] or param == "messages"
    assert len(error["message"]) < 400


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_not_finite(alive: Any, number: str) -> None:
    body = f'{{"prompt": "x", "temperature": {number}}}'
    response = alive.http.post(TEXT, content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "temperature")


def test_defaults_of_unsupported_fields_are_fine(live: Any) -> None:
    body: dict[str, Any] = {"messages": HELLO, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    body |= {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": None, "n": 1, "user": "u", "unheard_of": {}}
    assert live.post(CHAT, body).status_code == 200


def test_unknown_model(alive: Any) -> None:
    for path, body in ((TEXT, {"prompt": "x"}), (CHAT, {"messages": HELLO})):
        status, error = alive.error(path, body | {"model": "gpt-5"})
        assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TEXT, {"prompt": "x" * 300}, "prompt"),
        (TEXT, {"prompt": [7] * 300}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 293}]}, "messages"),
        (NATIVE, {"input_ids": [7] * 300}, "input_ids"),
    ],
)
def test_prompt_too_long(alive: Any, path: str, body: dict[str, Any], param: str) -> None:
    status, error = alive.error(path, body)
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert "300 tokens" in error["message"]
    assert "256 tokens" in error["message"]


def test_the_longest_prompt_fits(live: Any) -> None:
    assert live.post(TEXT, {"prompt": "x" * 255}).json()["usage"]["completion_tokens"] == 1
    assert live.error(TEXT, {"prompt": "x" * 256})[0] == 400


def test_engines_refusal_names_the_field(make_live: Any) -> None:
    with make_live(FakeEngine(refuse="no pages for this")) as live:
        for stream in (False, True):
            status, error = live.error(TEXT, {"prompt": "x", "stream": stream})
            assert (status, error["param"], error["message"]) == (400, "prompt", "no pages for this")


def test_paths_and_methods(alive: Any) -> None:
    assert alive.http.get("/v2").status_code == 404
    assert alive.http.get("/v2").json()["error"]["type"] == "invalid_request_error"
    response = alive.http.get(TEXT)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert "Method Not Allowed" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/models/%ff%00", "/%ff", "/v1/models/%ed%a0%80", "/v1/models/" + "x" * 5000])
def test_strange_paths(alive: Any, path: str) -> None:
    response = alive.http.get(path)
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_half_a_body(alive: Any, caplog: pytest.LogCaptureFixture) -> None:
    before = alive.metrics().get('polyradix_errors_total{status="400"}', 0)
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", alive.http.base_url.port)) as sock:
        sock.sendall(head.encode() + b'{"prompt"')
    alive.wait(lambda: alive.metrics().get('polyradix_errors_total{status="400"}', 0) == before + 1)
    assert "Traceback" not in caplog.text


def test_a_body_that_stalls_is_given_up(alive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "STALL_SECONDS", 0.05)
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    with socket.create_connection(("127.0.0.1", alive.http.base_url.port), timeout=60) as sock:
        sock.sendall(head.encode() + b'{"prompt"')
        answer = b"".join(iter(lambda: sock.recv(4096), b""))  # until the server hangs up
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"no more of the body" in answer


@pytest.mark.parametrize(("path", "param"), [(TEXT, "prompt"), (CHAT, "messages")])
def test_texts_that_cannot_fit_are_not_tokenized(
    alive: Any, monkeypatch: pytest.MonkeyPatch, path: str, param: str
) -> None:
    monkeypatch.setattr(alive.server.tokenizer, "encode", None)
    text = "x" * 5_000_000
    body = {"prompt": text} if path == TEXT else {"messages": [{"role": "user", "content": text}]}
    status, error = alive.error(path, body)
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert "50000" in error["message"]
    assert "256 tokens" in error["message"]


def test_body_too_large(make_live: Any) -> None:
    with make_live(FakeEngine(), max_body=1000) as live:
        status, error = live.error(TEXT, {"prompt": "x" * 2000})
        assert status == 413
        assert "1000 bytes" in error["message"]
        assert live.post(TEXT, {"prompt": "ok"}).status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    "prompt",
    "messages",
    "max_tokens",
    "temperature",
    "stop",
    "logprobs",
    "stream",
    "n",
    "stream_options",
    "seed",
    "priority",
    "timeout",
    "cache_salt",
    "extra_key",
    "user",
    "tools",
    "tool_choice",
    "logit_bias",
    "min_tokens",
    "presence_penalty",
    "echo",
    "best_of",
    "input",
    "text",
    "reasoning",
    "instructions",
]


@settings(max_examples=250)
@given(
    path=st.sampled_from([CHAT, TEXT, NATIVE, "/v1/responses"]),
    body=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5),
)
def test_never_a_500(live: Any, path: str, body: dict[str, Any]) -> None:
    text = json.dumps({"prompt": "x", "messages": HELLO, "input_ids": [1], "input": "x"} | body)
    response = live.http.post(path, content=text, headers={"content-type": "application/json"})
    assert response.status_code in (200, 400), response.text
