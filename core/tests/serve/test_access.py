"""Keys, their limits, the operator's key, CORS, and the limits of a request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from polyradix.serve import access
from polyradix.serve.access import Bucket, Key, KeyFileError, load_keys
from polyradix.serve.fake import FakeEngine

TEXT = "/v1/completions"
ALICE = Key("alice", "sk-a")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def guarded(make_live: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server for which no time passes: nothing is given back of what is used up."""
    monkeypatch.setattr(access, "Bucket", partial(Bucket, clock=lambda: 100.0))
    keys = [ALICE, Key("few", "sk-few", requests_per_minute=2), Key("small", "sk-small", tokens_per_minute=10)]
    with make_live(FakeEngine(), keys=keys, admin_key="root") as live:
        yield live


def ask(live: Any, key: str | None, prompt: str = "abc") -> Any:
    return live.http.post(TEXT, json={"prompt": prompt}, headers=bearer(key) if key else {})


def test_only_known_keys_get_in(guarded: Any) -> None:
    assert ask(guarded, "sk-a").status_code == 200
    assert guarded.engine.submits[-1].tenant == "alice"
    wrong: list[dict[str, Any]] = [
        {},
        bearer("sk-b"),
        bearer("sk-"),
        {"Authorization": "Bearer"},
        {"Authorization": "Basic sk-a"},
    ]
    for headers in [*wrong, {"Authorization": b"Bearer \xff\xfe"}, {"X-Api-Key": "sk-a"}]:
        for path in (TEXT, "/v1/embeddings", "/tokenize", "/generate"):
            response = guarded.http.post(path, json={"prompt": "abc"}, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/v1/models", "/server_info", "/docs", "/openapi.json", "/health_generate", "/nothing"):
            assert guarded.http.get(path, headers=headers).status_code == 401
    assert guarded.http.get("/v1/models", headers=bearer("sk-a")).status_code == 200
    assert len(guarded.engine.submits) == 1


def test_probes_and_scrapers_need_no_key(guarded: Any) -> None:
    assert guarded.http.get("/health").status_code == 200
    assert guarded.http.get("/metrics").status_code == 200


def test_the_official_client_understands(guarded: Any) -> None:
    for key, good, error in (("sk-b", 0, openai.AuthenticationError), ("sk-few", 2, openai.RateLimitError)):
        client = openai.OpenAI(base_url=guarded.url + "/v1", api_key=key, max_retries=0)
        for _ in range(good):
            client.completions.create(model="fake", prompt="x")
        with pytest.raises(error):
            client.completions.create(model="fake", prompt="x")


def test_requests_per_minute(guarded: Any) -> None:
    assert [ask(guarded, "sk-few").status_code for _ in range(4)] == [200, 200, 429, 429]
    response = ask(guarded, "sk-few")
    assert 1 <= int(response.headers["retry-after"]) <= 30
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("rate_limit_exceeded", "rate_limit_error")
    assert "requests" in error["message"]
    assert guarded.http.get("/v1/models", headers=bearer("sk-few")).status_code == 200
    assert ask(guarded, "sk-a").status_code == 200


def test_tokens_per_minute(guarded: Any) -> None:
    assert ask(guarded, "sk-small", "abc").status_code == 200  # 3 in, 3 out
    assert ask(guarded, "sk-small", "abc").status_code == 200  # overdraws
    response = ask(guarded, "sk-small")
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) == 18  # 3 tokens at 10 a minute
    assert "tokens" in response.json()["error"]["message"]


def test_bucket() -> None:
    now = 100.0
    bucket = Bucket(60, lambda: now)
    for _ in range(60):
        assert bucket.wait() == 0
        bucket.take(1)
    assert bucket.wait() == pytest.approx(1)
    now += 0.5
    assert bucket.wait() == pytest.approx(0.5)
    now += 1000
    bucket.take(0)
    assert bucket.wait() == 0
    bucket.take(61)
    assert bucket.wait() == pytest.approx(2)


def test_operators_routes(guarded: Any, make_live: Any) -> None:
    for key, status in ((None, 401), ("sk-a", 401), ("root", 200)):
        headers = bearer(key) if key else {}
        assert guarded.http.post("/flush_cache", headers=headers).status_code == status
    assert ask(guarded, "root").status_code == 200
    with make_live(FakeEngine(), keys=[ALICE]) as live:
        response = live.http.post("/flush_cache", headers=bearer("sk-a"))
        assert (response.status_code, response.json()["error"]["code"]) == (403, "no_admin_key")
    with make_live(FakeEngine(), admin_key="root") as live:
        assert ask(live, None).status_code == 200
        assert live.http.post("/flush_cache").status_code == 401
        assert live.http.post("/flush_cache", headers=bearer("root")).status_code == 200


FILE = """
[[keys]]
name = "alice"
key = "sk-a"
[[keys]]
name = "bob"
key = "sk-b"
requests_per_minute = 60
tokens_per_minute = 1000
"""


def test_key_files(tmp_path: Path) -> None:
    want = [ALICE, Key("bob", "sk-b", 60, 1000)]
    toml, as_json = tmp_path / "keys.toml", tmp_path / "keys.json"
    toml.write_text(FILE)
    assert load_keys(toml) == want
    bob = {"name": "bob", "key": "sk-b", "requests_per_minute": 60, "tokens_per_minute": 1000}
    as_json.write_text(json.dumps({"keys": [{"name": "alice", "key": "sk-a"}, bob]}))
    assert load_keys(as_json) == want


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "Expected"),
        ("[keys]", "keys"),
        ('[[keys]]\nname = "x"', "key"),
        ('[[keys]]\nname = "x"\nkey = 5', "key"),
        ('[[keys]]\nname = "x"\nkey = ""', "empty"),
        ('[[keys]]\nname = "x"\nkey = "secret"\nrpm = 5', "rpm"),
        ('[[keys]]\nname = "x"\nkey = "secret"\nrequests_per_minute = 0', "requests_per_minute"),
        ("\udcff", "decode"),
    ],
)
def test_bad_key_files(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(KeyFileError, match=said) as error:
        load_keys(path)
    assert "secret" not in str(error.value)
    with pytest.raises(KeyFileError, match="none"):
        load_keys(tmp_path / "none")


def test_cors_is_off_by_default(guarded: Any, make_live: Any) -> None:
    preflight = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in guarded.http.options(TEXT, headers=preflight).headers
    with make_live(FakeEngine(), keys=[ALICE], cors_origins=["https://a.example"]) as live:
        for origin, allowed in (("https://a.example", "https://a.example"), ("https://b.example", None)):
            headers = preflight | {"Origin": origin}
            assert live.http.options(TEXT, headers=headers).headers.get("access-control-allow-origin") == allowed
            got = live.http.post(TEXT, json={"prompt": "x"}, headers=bearer("sk-a") | {"Origin": origin})
            assert (got.status_code, got.headers.get("access-control-allow-origin")) == (200, allowed)


def test_limits_of_a_request(make_live: Any) -> None:
    with make_live(FakeEngine(lambda _: [97] * 100), max_prompt=5, max_tokens=7) as live:
        status, error = live.error(TEXT, {"prompt": "abcdef"})
        assert (status, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")
        assert "6 tokens" in error["message"]
        assert "at most 5" in error["message"]
        status, error = live.error(TEXT, {"prompt": "abc", "max_tokens": 8})
        assert (status, error["param"]) == (400, "max_tokens")
        chat = {"messages": [{"role": "user", "content": ""}]}
        assert live.error("/v1/chat/completions", chat)[0] == 400  # the template alone is too long
        assert live.post(TEXT, {"prompt": "abc", "max_tokens": 7}).json()["usage"]["completion_tokens"] == 7
        assert live.post(TEXT, {"prompt": "abc"}).json()["usage"]["completion_tokens"] == 7


def test_a_closing_server_takes_no_work(make_live: Any) -> None:
    with make_live(FakeEngine()) as live:
        live.server.closing = True
        response = live.post(TEXT, {"prompt": "x"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert live.http.get("/health").status_code == 503
        assert live.http.get("/metrics").status_code == 200
