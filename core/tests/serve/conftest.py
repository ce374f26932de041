from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from polyradix.engine.messages import Chunk
from polyradix.serve.app import Server, make_app
from polyradix.serve.client import Call, EngineClient
from polyradix.serve.fake import ByteTokenizer, FakeEngine
from polyradix.serve.run import listen

sys.path.insert(0, str(Path(__file__).parent))
from served import DEVICE, Process

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

    def wait(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "did not happen in time"
            time.sleep(0.01)

    def hang_up(self, path: str, body: object, when: Callable[[], bool]) -> None:
        """Posts, and closes the connection once `when` is true."""
        connection = http.client.HTTPConnection(self.http.base_url.host, self.http.base_url.port)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        self.wait(when)
        connection.close()

    def metrics(self) -> dict[str, float]:
        lines = [line for line in self.http.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@contextlib.contextmanager
def live_server(engine: FakeEngine, tokenizer: Any = None, **options: Any) -> Iterator[Live]:
    sock = listen("127.0.0.1", 0)
    client = EngineClient(engine)
    server = Server(client, tokenizer or ByteTokenizer(), "fake", **options)
    serving = uvicorn.Server(uvicorn.Config(make_app(server), log_config=None, lifespan="off"))

    async def run() -> None:
        await client.start()
        await serving.serve(sockets=[sock])
        await client.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60) as session:
            it = Live(url, engine, server, session)
            it.wait(lambda: client.ready is not None or client.error != "")
            yield it
    finally:
        serving.should_exit = True
        thread.join(60)
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


@pytest.fixture
def paced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeEngine]:
    """Makes a fake engine for one request, which gets a token when it asks for more: each comes alone, however slow the
    machine."""
    asked, next_chunks = threading.Semaphore(0), Call.next

    async def ask(self: Call) -> list[Chunk]:
        asked.release()
        return await next_chunks(self)

    class Paced(FakeEngine):
        def _step(self, rid: str) -> Chunk:
            while not asked.acquire(timeout=0.05) and not self._stop.is_set():
                pass
            return super()._step(rid)

    monkeypatch.setattr(Call, "next", ask)
    return Paced


@pytest.fixture(scope="session")
def make_live() -> Callable[..., contextlib.AbstractContextManager[Live]]:
    return live_server


@pytest.fixture(scope="session")
def model(byte_model: Callable[[int, str], Path]) -> Path:
    """A model to be made of random weights, with one token a byte and a chat template."""
    return byte_model(2, TEMPLATE)


@pytest.fixture(scope="module")
def ending_server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Its model has a token that ends an output, which grammars need."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": 0}))
    process = Process(folder, DEVICE, "--tool-call-parser", "hermes", "--embeddings", "last")
    yield process
    process.close()
    assert process.process.returncode == 0
    assert "Traceback" not in process.log
