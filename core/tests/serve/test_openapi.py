"""schemathesis sends what the OpenAPI document allows, and what it does not: never a 5xx, always OpenAI's error."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

from polyradix.serve.app import Server, make_app
from polyradix.serve.client import EngineClient
from polyradix.serve.fake import ByteTokenizer, FakeEngine


@pytest.fixture(scope="module")
def server(make_live: Any) -> Any:
    with make_live(FakeEngine(), pooling="last") as live:
        yield live


app = make_app(Server(EngineClient(FakeEngine()), ByteTokenizer(), "fake"))
schema = schemathesis.openapi.from_dict(app.openapi())


@schema.parametrize()
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_no_server_errors(case: Any, server: Any) -> None:
    response = case.call(base_url=server.url)
    checks = (not_a_server_error, status_code_conformance, response_schema_conformance)
    case.validate_response(response, checks=list(checks))


def test_bodies_are_described(server: Any) -> None:
    found = server.http.get("/openapi.json").json()
    posts = {path: ops["post"] for path, ops in found["paths"].items() if "post" in ops and path != "/flush_cache"}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/generate", "/tokenize"} <= set(posts)
    for path, operation in posts.items():
        name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert found["components"]["schemas"][name]["properties"], path
    assert "messages" in found["components"]["schemas"]["ChatRequest"]["required"]


GARBAGE = [
    b"\xff\xfe\x00\x80",
    b"\x00" * 1000,
    b"[" * 200_000,
    b'{"a":' * 200_000,
    b'{"model": "\\ud800"}',
    b'{"model": NaN}',
    b'{"model": ' + b"9" * 10_000 + b"}",
    b'{"tokens": [1e400], "prompt": [1e400], "input": [1e400], "input_ids": [1e400], "messages": [1e400]}',
    b'{"tokens": [1], "prompt": 1, "input": 1, "input_ids": 1, "messages": {"role": []}}',
]


@pytest.mark.parametrize("body", GARBAGE, ids=lambda body: str(body[:12]))
def test_garbage(server: Any, body: bytes) -> None:
    posts = [path for path, ops in app.openapi()["paths"].items() if "requestBody" in ops.get("post", {})]
    assert len(posts) >= 6
    for path in posts:
        response = server.http.post(path, content=body, headers={"content-type": "application/json"})
        good = path == "/detokenize" and b'"tokens": [1]' in body
        assert (response.status_code, path) == (200 if good else 400, path)
        assert good or response.json()["error"]["type"] == "invalid_request_error"


def test_still_there(server: Any) -> None:
    """Runs last: the server that took all of it answers."""
    assert server.post("/v1/completions", {"prompt": "ok"}).json()["choices"][0]["text"] == "ok"
    assert server.engine.running == 0
