from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from polyradix.serve.app import Server, make_app
from polyradix.serve.client import EngineClient
from polyradix.serve.fake import ByteTokenizer, FakeEngine
from polyradix.serve.run import listen

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "vocab_size": 256,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "float32",
}
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@dataclass
class Live:
    """A server in a thread, with a fake engine behind it."""

    url: str
    engine: FakeEngine
    server: Server
    http: httpx.Client

    def post(self, path: str, body: object) -> httpx.Response:
        return self.http.post(path, json=body)

    def error(self, path: str, body: object) -> tuple[int, dict[str, Any]]:
        response = self.post(path, body)
        error: dict[str, Any] = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return response.status_code, error

    def wait(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "did not happen in time"
            time.sleep(0.01)

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@contextlib.contextmanager
def live_server(engine: FakeEngine, **options: Any) -> Iterator[Live]:
    sock = listen("127.0.0.1", 0)
    client = EngineClient(engine)
    server = Server(client, ByteTokenizer(), "fake", **options)
    http = uvicorn.Server(uvicorn.Config(make_app(server), log_config=None, lifespan="off"))

    async def run() -> None:
        await client.start()
        await http.serve(sockets=[sock])
        await client.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=20) as session:
            it = Live(url, engine, server, session)
            it.wait(lambda: client.ready is not None or client.error != "")
            yield it
    finally:
        http.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def shared() -> Iterator[Live]:
    with live_server(FakeEngine()) as it:
        yield it


@pytest.fixture
def live(shared: Live) -> Live:
    """One server for the tests of a file, with nothing to remember. The answer is the prompt."""
    shared.engine.submits.clear()
    shared.engine.aborts.clear()
    return shared


@pytest.fixture
def slow() -> Iterator[Live]:
    """Answers a token every 10 ms, as many as are asked for."""
    with live_server(FakeEngine(lambda _: [97] * 10_000, step_seconds=0.01, max_context=20_000)) as it:
        yield it


@pytest.fixture(scope="session")
def make_live() -> Callable[..., contextlib.AbstractContextManager[Live]]:
    return live_server


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to be made of random weights, with one token a byte and a chat template."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
