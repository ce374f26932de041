"""Hang-ups, a dying engine, and what the operator sees."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from polyradix.serve.fake import FakeEngine

CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"


@pytest.mark.parametrize("n", [1, 3])
def test_hang_up_while_streaming_aborts(slow: Any, n: int) -> None:
    with slow.http.stream("POST", TEXT, json={"prompt": "x", "max_tokens": 5000, "stream": True, "n": n}) as response:
        lines = response.iter_lines()  # closes the response when it is collected
        next(lines)
        slow.wait(lambda: slow.engine.running == n)
    slow.wait(lambda: slow.engine.running == 0)
    assert sorted(slow.engine.aborts) == sorted(s.rid for s in slow.engine.submits)
    assert slow.server.client._calls == {}
    slow.wait(lambda: slow.metrics()['polyradix_requests_total{outcome="abort"}'] == n)


def test_hang_up_while_waiting_aborts(slow: Any) -> None:
    slow.hang_up(TEXT, {"prompt": "x", "max_tokens": 5000}, lambda: slow.engine.running == 1)
    slow.wait(lambda: len(slow.engine.aborts) == 1)
    assert slow.server.client._calls == {}


def test_finished_requests_are_not_aborted(live: Any) -> None:
    for stream in (False, True):
        assert live.post(TEXT, {"prompt": "abc", "stream": stream}).status_code == 200
    assert live.post(TEXT, {"prompt": "after"}).status_code == 200
    assert live.engine.aborts == []


def test_stop_string_aborts_the_rest(slow: Any) -> None:
    response = slow.post(TEXT, {"prompt": "x", "max_tokens": 5000, "stop": "aaaa"}).json()
    assert response["choices"][0] == {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    slow.wait(lambda: len(slow.engine.aborts) == 1)


def test_many_clients_half_hang_up(slow: Any) -> None:
    def client(i: int) -> int:
        body = {"prompt": "x", "max_tokens": 20 if i % 2 else 5000, "stream": True}
        with slow.http.stream("POST", TEXT, json=body) as response:
            lines = response.iter_lines()
            if i % 2 == 0:
                return len([next(lines) for _ in range(3)])
            return sum(len(json.loads(line[6:])["choices"][0]["text"]) for line in lines if line.startswith("data: {"))

    with ThreadPoolExecutor(40) as pool:
        assert list(pool.map(client, range(40))) == [3, 20] * 20
    slow.wait(lambda: slow.engine.running == 0)
    assert len(slow.engine.aborts) == 20
    assert slow.server.client._calls == {}


def test_slow_reader_gets_everything(make_live: Any) -> None:
    with make_live(FakeEngine(lambda _: [97] * 5000, max_context=6000)) as live:
        body = {"prompt": "x", "max_tokens": 5000, "stream": True, "logprobs": 0}
        with live.http.stream("POST", TEXT, json=body) as response:
            live.wait(lambda: live.engine.submits and live.engine.running == 0)  # all of it is waiting for the reader
            events = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert "".join(c["text"] for c in choices) == "a" * 5000
    assert sum(len(c["logprobs"]["tokens"]) for c in choices) == 5000
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["length"]


def test_engine_death_ends_everything(slow: Any) -> None:
    def whole() -> httpx.Response:
        return httpx.post(slow.url + TEXT, json={"prompt": "x", "max_tokens": 5000}, timeout=60)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(whole)
        with slow.http.stream("POST", CHAT, json={"messages": [{"role": "user", "content": "x"}], "stream": True}) as r:
            lines = (line for line in r.iter_lines() if line)
            next(lines)
            slow.wait(lambda: slow.engine.running == 2)
            slow.engine.die()
            last = list(lines)[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "the fake engine ended"
        assert waiting.result().status_code == 503
        assert waiting.result().json()["error"]["code"] == "engine_unavailable"
    for path in ("/health", "/v1/models"):
        response = slow.http.get(path)
        assert response.status_code == (503 if path == "/health" else 200)
    assert slow.error(TEXT, {"prompt": "x"})[0] == 503
    assert slow.http.post("/flush_cache").status_code == 503
    assert slow.metrics()["polyradix_engine_up"] == 0
    assert slow.metrics()['polyradix_requests_total{outcome="error"}'] == 2


def test_engine_that_cannot_start(make_live: Any) -> None:
    with make_live(FakeEngine(failure="no such device")) as live:
        response = live.http.get("/health")
        assert (response.status_code, response.json()["error"]["message"]) == (503, "no such device")
        assert live.error(TEXT, {"prompt": "x"})[0] == 503


def test_native_route(live: Any) -> None:
    body = {"input_ids": [5, 6, 7], "stop_token_ids": [7], "logprobs": 1}
    answer = live.post(NATIVE, body).json()
    assert answer["output_ids"] == [5, 6, 7]
    assert answer["finish_reason"] == "stop"
    assert answer["logprobs"] == [[-0.5, [[97, -1.0]]]] * 2
    assert answer["usage"]["completion_tokens"] == 3
    text = live.post(NATIVE, body | {"stream": True}).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert [token for e in events for token in e["output_ids"]] == [5, 6, 7]
    assert [e["finish_reason"] for e in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["finish_reason"] == "stop"
    assert events[-1]["usage"]["completion_tokens"] == 3


def test_operator_routes(make_live: Any, paced: Any) -> None:
    with make_live(paced()) as live:
        assert live.http.get("/health").json() == {"status": "ok", "max_context": 256}
        live.post(TEXT, {"prompt": "abcd"})
        info = live.http.get("/server_info").json()
        assert (info["model"], info["context"], info["device"]) == ("fake", 256, "fake")
        assert info["stats"]["pages_total"] == 100
        assert live.http.post("/flush_cache").status_code == 200
        live.wait(lambda: live.engine.flushes == 1)
        live.error(TEXT, {})
        seen = live.metrics()
        assert seen['polyradix_requests_total{outcome="stop"}'] == 1
        assert seen['polyradix_errors_total{status="400"}'] == 1
        assert seen["polyradix_time_to_first_token_seconds_count"] == 1
        assert seen["polyradix_inter_token_seconds_count"] == 3
        assert seen["polyradix_request_seconds_count"] == 1
        assert seen["polyradix_engine_up"] == 1
        assert seen["polyradix_engine_pages_total"] == 100
        paths = live.http.get("/openapi.json").json()["paths"]
        assert "requestBody" in paths[CHAT]["post"]
