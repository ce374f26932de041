"""`polyradix serve` with the real engine process, a tiny model of random weights and a tokenizer of bytes."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from served import DEVICE, SCHEMA, Process, gone, wait


@pytest.fixture(scope="module")
def numpy_server(model: Path) -> Iterator[Process]:
    process = Process(model, DEVICE)
    yield process
    process.close()
    assert process.process.returncode == 0
    assert "Traceback" not in process.log


def test_ready_line(numpy_server: Process, model: Path) -> None:
    assert str(model) in numpy_server.line
    assert "float32, context 512" in numpy_server.line


def test_greedy_is_the_same_streamed_cached_and_among_others(numpy_server: Process) -> None:
    with openai.OpenAI(base_url=numpy_server.url + "/v1", api_key="none", max_retries=0) as client:

        def text(stream: bool, temperature: float, seed: int | None = None) -> str:
            got: Any = client.completions.create(
                model="tiny",
                prompt="The quick brown fox jumps over the lazy dog. " * 3,
                max_tokens=24,
                stream=stream,
                temperature=temperature,
                seed=seed,
                extra_body={"ignore_eos": True},
            )
            return "".join(c.choices[0].text for c in (got if stream else [got]))

        first = text(False, temperature=0)
        assert len(first) > 0
        assert text(True, temperature=0) == first
        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(text, bool(i % 2), temperature=0) for i in range(6)]
            others = [pool.submit(text, True, temperature=1, seed=i) for i in range(2)]
            assert {f.result() for f in futures} == {first}
            assert len({f.result() for f in others}) == 2
        assert text(False, temperature=1, seed=1) == others[1].result()


FLAG = {"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"], "additionalProperties": False}
CALL = {
    "structures": [{"begin": "<f=a>", "schema": FLAG, "end": "</f>"}],
    "triggers": ["<f="],
    "at_least_one": True,
    "stop_after_first": True,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("extra", "fits"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA}}}, "json"),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json"),
        ({"response_format": {"type": "regex", "regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"response_format": {"type": "grammar", "grammar": 'root ::= "x" | "(" root ")"'}}, r"\(*x\)*"),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "[ab]{3}"),
        ({"structured_outputs": {"grammar": 'start: "x"+'}}, "x+"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"response_format": {"type": "structural_tag", **CALL}}, r'<f=a>{"n": (true|false)}</f>'),
        ({"structured_outputs": {"structural_tag": json.dumps(CALL)}}, r'<f=a>{"n": (true|false)}</f>'),
    ],
)
def test_structured_outputs(ending_server: Process, stream: bool, extra: dict[str, Any], fits: str) -> None:
    with openai.OpenAI(base_url=ending_server.url + "/v1", api_key="none", max_retries=0) as client:
        got: Any = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Who?"}], seed=3, stream=stream, extra_body=extra
        )
        if stream:
            text = "".join(c.choices[0].delta.content or "" for c in got if c.choices)
        else:
            text = got.choices[0].message.content
            assert got.choices[0].finish_reason == "stop"
    if fits == "json":
        jsonschema.validate(json.loads(text), SCHEMA)
    else:
        assert re.fullmatch(fits, text)
    wait(lambda: ending_server.metrics()["polyradix_engine_grammar_seconds_total"] > 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("field", "value", "param", "reason"),
    [
        ("response_format", {"type": "regex", "regex": "["}, "response_format.regex", "regex"),
        ("structured_outputs", {"json": {"not": {}}}, "structured_outputs.json", "not"),
        ("structured_outputs", {"json": "[" * 3000}, "structured_outputs.json", "recursion"),
        ("structured_outputs", {"choice": [1]}, "structured_outputs.choice", "strings"),
        ("response_format", {"type": "structural_tag", **CALL, "triggers": ["<g"]}, "response_format", "triggers"),
    ],
)
def test_a_grammar_that_cannot_be_met_is_the_clients_error(
    ending_server: Process, stream: bool, field: str, value: object, param: str, reason: str
) -> None:
    body = {"prompt": "x", "stream": stream, field: value}
    reply = ending_server.http.post("/v1/completions", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert reason in reply.json()["error"]["message"]


TOOL: Any = {"type": "function", "function": {"name": "person", "parameters": SCHEMA}}


@pytest.mark.parametrize("stream", [False, True])
def test_calls_that_must_come(ending_server: Process, stream: bool) -> None:
    """The model is random; its calls are right."""
    named = {"type": "function", "function": {"name": "person"}}
    with openai.OpenAI(base_url=ending_server.url + "/v1", api_key="none", max_retries=0) as client:
        for seed, choice in enumerate(["required", named]):
            got: Any = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "Who?"}],
                tools=[TOOL],
                tool_choice=choice,
                parallel_tool_calls=False,
                seed=seed,
                stream=stream,
            )
            chunks = [c.choices[0] for c in (got if stream else [got])]
            calls = [call for c in chunks for call in (c.delta if stream else c.message).tool_calls or []]
            assert calls[0].function.name == "person"
            jsonschema.validate(json.loads("".join(call.function.arguments for call in calls)), SCHEMA)
            assert chunks[-1].finish_reason == "tool_calls"
        flat = {"type": "function", "name": "person", "parameters": SCHEMA, "strict": True}
        answer = client.responses.create(
            model="tiny", input="Who?", tools=[flat], tool_choice="required", parallel_tool_calls=False
        )
        (item,) = answer.output
        assert item.type == "function_call"
        jsonschema.validate(json.loads(item.arguments), SCHEMA)
        form: Any = {"type": "json_schema", "name": "p", "schema": SCHEMA}
        jsonschema.validate(json.loads(client.responses.create(input="x", text={"format": form}).output_text), SCHEMA)


def test_a_tool_that_cannot_be_kept_is_named(ending_server: Process) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "not": {}}}}
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "tool_choice": "required"}
    for stream in (False, True):
        reply = ending_server.http.post("/v1/chat/completions", json=body | {"stream": stream})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools")


def test_biases_and_least_lengths(ending_server: Process) -> None:
    """Token 32 is A; token 0 ends an output."""
    with openai.OpenAI(base_url=ending_server.url + "/v1", api_key="none", max_retries=0) as client:

        def text(**extra: Any) -> tuple[str, int]:
            answer = client.completions.create(
                model="tiny", prompt="x", temperature=0, max_tokens=9, logit_bias={"32": 90}, extra_body=extra
            )
            assert answer.usage is not None
            return answer.choices[0].text, answer.usage.completion_tokens

        assert text() == ("A" * 9, 9)
        assert text(logit_bias={"32": 90, "0": 100}) == ("", 1)
        assert text(logit_bias={"32": 90, "0": 100}, min_tokens=4) == ("AAAA", 5)
        extra = {"frequency_penalty": 2, "presence_penalty": 2, "repetition_penalty": 50, "min_tokens": 9}
        unlike = client.completions.create(model="tiny", prompt="x", max_tokens=9, logprobs=0, extra_body=extra)
        assert unlike.choices[0].logprobs is not None
        assert len(set(unlike.choices[0].logprobs.tokens or [])) == 9


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_an_echo(ending_server: Process, stream: bool) -> None:
    with openai.OpenAI(base_url=ending_server.url + "/v1", api_key="none", max_retries=0) as client:
        prompt, entries = "An echo!", list[float]()
        for n in range(1, len(prompt)):  # each next token by itself, forced by a bias
            token = ord(prompt[n]) - 33 if prompt[n] != " " else None
            bias = {} if token is None else {str(token): 100}
            answer = client.completions.create(
                model="tiny", prompt=prompt[:n], temperature=0, max_tokens=1, logprobs=0, logit_bias=bias
            )
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            if token is not None and token != 0:
                assert logprobs.tokens == [prompt[n]]
                entries += logprobs.token_logprobs or []
        got: Any = client.completions.create(
            model="tiny", prompt=prompt, echo=True, max_tokens=0, logprobs=2, stream=stream
        )
        chunks = [c.choices[0] for c in (got if stream else [got])]
    assert "".join(c.text for c in chunks) == prompt
    tokens = [t for c in chunks if c.logprobs for t in c.logprobs.tokens]
    values = [t for c in chunks if c.logprobs for t in c.logprobs.token_logprobs]
    assert tokens == list(prompt)
    assert values[0] is None
    kept = [v for t, v in zip(tokens[1:], values[1:], strict=True) if t not in " !"]
    assert kept == pytest.approx(entries, abs=1e-3)


def test_best_of(ending_server: Process) -> None:
    body = {"prompt": "x", "best_of": 3, "max_tokens": 5, "ignore_eos": True, "seed": 1}
    reply = ending_server.http.post("/v1/completions", json=body).json()
    assert (len(reply["choices"]), reply["usage"]["completion_tokens"]) == (1, 15)


def test_grammars_need_a_token_that_ends(numpy_server: Process) -> None:
    reply = numpy_server.http.post("/v1/completions", json={"prompt": "x", "structured_outputs": {"regex": "a"}})
    assert reply.status_code == 400
    assert "no end-of-sequence token" in reply.json()["error"]["message"]


def test_second_turn_reuses_the_first(numpy_server: Process) -> None:
    with openai.OpenAI(base_url=numpy_server.url + "/v1", api_key="none", max_retries=0) as client:
        messages: list[openai.types.chat.ChatCompletionMessageParam] = [
            {"role": "user", "content": "A first question that is long enough for some pages of the cache."}
        ]
        first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
        messages.append({"role": "assistant", "content": "an answer"})
        messages.append({"role": "user", "content": "and a second question"})
        second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=8, temperature=0)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert first.usage.prompt_tokens - 16 <= cached <= first.usage.prompt_tokens


def test_two_hundred_clients_half_hanging_up(model: Path) -> None:
    server = Process(model, "null", "--max-seqs", "32", "--kv-pages", "300")
    try:

        def client(i: int) -> int:
            body = {"prompt": f"client {i % 7}: " * (1 + i % 5), "max_tokens": 60, "stream": True, "ignore_eos": True}
            body |= {"stream_options": {"include_usage": True}}
            with http.stream("POST", "/v1/completions", json=body) as response:
                lines = (line for line in response.iter_lines() if line.startswith("data: {"))
                if i % 2 == 0:
                    next(lines)
                    return 0
                return int(json.loads(list(lines)[-1][6:])["usage"]["completion_tokens"])

        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=server.url, timeout=60, limits=limits) as http, ThreadPoolExecutor(200) as pool:
            assert list(pool.map(client, range(200))) == [0, 60] * 100
        wait(lambda: server.metrics()["polyradix_engine_running"] == 0)
        seen = server.metrics()
        assert seen["polyradix_engine_waiting"] == 0
        assert seen["polyradix_engine_pages_used"] == 0
        assert seen["polyradix_engine_pages_total"] == 299
        assert seen["polyradix_engine_pages_cached"] > 0
        assert seen['polyradix_requests_total{outcome="length"}'] >= 100
        server.http.post("/flush_cache").raise_for_status()
        wait(lambda: server.metrics()["polyradix_engine_pages_cached"] == 0)
    finally:
        server.close()
    assert server.process.returncode == 0
    assert "Traceback" not in server.log


def test_ctrl_c_lets_running_requests_finish(model: Path) -> None:
    server = Process(model, "null", "--option", "step_time_s=0.01")
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": "x", "max_tokens": 150, "ignore_eos": True}
        answer = pool.submit(server.http.post, "/v1/completions", json=body)
        wait(lambda: server.metrics()["polyradix_engine_prompt_tokens_total"] == 1)
        engine = server.engine_pid
        os.killpg(server.process.pid, signal.SIGINT)
        assert answer.result().json()["usage"]["completion_tokens"] == 150
    assert server.process.wait(60) == 0
    server.close()
    assert "Traceback" not in server.log
    wait(lambda: gone(engine))


def test_second_signal_ends_them_at_once(model: Path) -> None:
    server = Process(model, "null", "--option", "step_time_s=0.1")
    with ThreadPoolExecutor(8) as pool:
        body = {"prompt": ["x"] * 64, "max_tokens": 500, "ignore_eos": True}
        answers = [pool.submit(server.http.post, "/v1/completions", json=body) for _ in range(8)]
        wait(lambda: server.metrics()["polyradix_engine_running"] + server.metrics()["polyradix_engine_waiting"] == 512)
        server.process.terminate()
        wait(lambda: server.http.get("/health").status_code == 503)
        assert server.process.poll() is None
        server.process.terminate()
        for answer in answers:
            assert answer.result().status_code == 503
            assert answer.result().json()["error"]["message"] == "the server is shutting down"
    assert server.process.wait(60) == 0
    server.close()
    assert "Traceback" not in server.log


def test_killed_engine_is_an_error_and_the_server_stays(model: Path) -> None:
    server = Process(model, "null")
    try:
        os.kill(server.engine_pid, signal.SIGKILL)
        wait(lambda: server.http.get("/health").status_code == 503)
        error = server.http.post("/v1/completions", json={"prompt": "x"})
        assert error.status_code == 503
        assert "exit code -9" in error.json()["error"]["message"]
    finally:
        server.close()
    assert server.process.returncode == 0


def test_killed_server_takes_the_engine_along(model: Path) -> None:
    server = Process(model, "null")
    engine = server.engine_pid
    server.process.kill()
    server.close()
    wait(lambda: gone(engine))


FLAGS = ["--schedule-policy", "priority", "--max-running-requests", "1", "--max-queued-requests", "1", "--fair"]
FLAGS += ["--eviction-policy", "priority", "--chunked-prefill-size", "16", "--request-timeout", "60"]
FLAGS += ["--schedule-conservativeness", "2"]


@pytest.fixture(scope="module")
def queue_server(model: Path) -> Iterator[Process]:
    process = Process(model, "numpy", *FLAGS)
    yield process
    process.close()
    assert process.process.returncode == 0
    assert "Traceback" not in process.log


def ask(server: Process, tokens: int, **more: Any) -> httpx.Response:
    body = {"prompt": "a b c", "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
    return server.http.post("/v1/completions", json=body | more)


def test_a_more_important_request_goes_first_and_nobody_sees_it(queue_server: Process) -> None:
    alone = ask(queue_server, 480).json()["choices"][0]["text"]
    body = {"prompt": "a b c", "max_tokens": 480, "ignore_eos": True, "temperature": 0, "stream": True, "priority": 2}
    with queue_server.http.stream("POST", "/v1/completions", json=body) as low:
        lines = low.iter_lines()
        events = [next(lines)]
        assert ask(queue_server, 3, priority=0).status_code == 200
        events += lines
    data = [json.loads(e.removeprefix("data: ")) for e in events if e and not e.endswith("[DONE]")]
    assert "".join(event["choices"][0]["text"] for event in data) == alone
    wait(lambda: queue_server.metrics()["polyradix_engine_preemptions_total"] >= 1)


def test_a_full_queue_and_a_timeout(queue_server: Process) -> None:
    full = ask(queue_server, 480, prompt=["a b c"] * 8)
    assert full.status_code == 503
    assert int(full.headers["retry-after"]) >= 1
    late = ask(queue_server, 480, timeout=0.001)
    assert late.status_code == 408
    assert late.json()["error"]["message"] == "the request was not done after 0.001 seconds, its timeout"
    assert ask(queue_server, 2, timeout=50).status_code == 200


def test_a_salt_separates_caches(queue_server: Process) -> None:
    def cached(**terms: Any) -> int:
        usage = ask(queue_server, 2, prompt="x" * 100, **terms).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached(cache_salt="one") == 0
    assert cached(cache_salt="one") > 0
    assert cached(cache_salt="two") == cached(extra_key="adapter") == cached() == 0
