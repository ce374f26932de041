"""priority, timeout, user, cache_salt and extra_key: what they do to a request, and their bad values."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from polyradix.engine.messages import Chunk
from polyradix.serve.fake import FakeEngine

CHAT, TEXT, NATIVE = "/v1/chat/completions", "/v1/completions", "/generate"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    TEXT: {"prompt": "hi"},
    NATIVE: {"input_ids": [1]},
}


@pytest.mark.parametrize("path", list(BODIES))
def test_terms_reach_the_engine(live: Any, path: str) -> None:
    assert live.post(path, BODIES[path]).status_code == 200
    terms = {"priority": -3, "timeout": 4, "user": "anna", "cache_salt": "s", "extra_key": "lora-1"}
    assert live.post(path, BODIES[path] | terms).status_code == 200
    assert live.post(path, BODIES[path] | {"user": "bert"}).status_code == 200
    plain, full, other = live.engine.submits
    assert (plain.namespace, plain.priority, plain.timeout, plain.tenant) == ("", 0, None, "")
    assert (full.priority, full.timeout) == (-3, 4)
    assert len({plain.tenant, full.tenant, other.tenant}) == 3


def test_a_namespace_is_shared_only_with_equal_salt_and_key(live: Any) -> None:
    bodies: list[dict[str, Any]] = [
        {},
        {"cache_salt": "a"},
        {"cache_salt": "b"},
        {"extra_key": "a"},
        {"extra_key": ["a"]},
        {"extra_key": ["a", "b"]},
        {"extra_key": ["ab"]},
        {"cache_salt": "a", "extra_key": "b"},
        {"cache_salt": "ab"},
        {"cache_salt": "\u00e9" * 100_000},
    ]
    for body in bodies * 2:
        assert live.post(TEXT, {"prompt": "hi"} | body).status_code == 200
    spaces = [submit.namespace for submit in live.engine.submits]
    assert spaces[: len(bodies)] == spaces[len(bodies) :]
    assert len(set(spaces)) == len(bodies)
    assert max(map(len, spaces)) <= 64


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("priority", "high"),
        ("priority", 2**40),
        ("priority", 1.5),
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", "1s"),
        ("cache_salt", ""),
        ("cache_salt", 5),
        ("extra_key", 5),
        ("extra_key", [5]),
        ("user", 5),
    ],
)
@pytest.mark.parametrize("path", list(BODIES))
def test_bad_terms_are_named(live: Any, path: str, field: str, value: Any) -> None:
    status, error = live.error(path, BODIES[path] | {field: value})
    assert status == 400
    assert error["param"].partition("[")[0] == field


class Ending(FakeEngine):
    """Gives a token and then, or at once, ends with a code."""

    def __init__(self, code: Any, tokens: int) -> None:
        super().__init__(lambda _: [97] * 100)
        self._code, self._tokens = code, tokens

    def _step(self, rid: str) -> Chunk:
        if self._running[rid][2] < self._tokens:
            return super()._step(rid)
        del self._running[rid]
        return Chunk(rid, [], finish="error", error="why", code=self._code)


def test_a_full_queue_is_503_with_retry_after(make_live: Any) -> None:
    with make_live(Ending("queue_full", 0)) as live:
        for stream in (False, True):
            response = live.post(TEXT, {"prompt": "hi", "stream": stream})
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"] == {
                "message": "why",
                "type": "server_error",
                "param": None,
                "code": "queue_full",
            }


def test_a_timeout_is_408_and_not_tried_again(make_live: Any) -> None:
    with make_live(Ending("timeout", 1)) as live:
        with (
            openai.OpenAI(base_url=live.url + "/v1", api_key="none") as client,
            pytest.raises(openai.APIStatusError) as caught,
        ):
            client.completions.create(model="fake", prompt="hi")
        assert (caught.value.status_code, caught.value.code, caught.value.type) == (408, "timeout", "timeout_error")
        assert len(live.engine.submits) == 1
        text = live.post(TEXT, {"prompt": "hi", "stream": True}).text
        events = [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line]
        assert "choices" in events[0]
        assert events[-1]["error"]["code"] == "timeout"
