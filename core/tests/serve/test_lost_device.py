"""A device that is lost while requests run on it: the real engine loop, on a backend that fails when it is told to."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq

from polyradix.backend.batch import HostBatch
from polyradix.backend.capabilities import DeviceLost
from polyradix.backend.null import NullBackend
from polyradix.engine import process
from polyradix.engine.config import EngineConfig
from polyradix.engine.core import EngineCore

BODY = {"prompt": "x", "max_tokens": 400, "ignore_eos": True}


class Fragile(NullBackend):
    def __init__(self) -> None:
        super().__init__(step_time_s=0.05, async_launch=True)
        self.error: Exception | None = None

    def prepare(self, batch: HostBatch, prev: Any = None) -> Any:
        if self.error is not None:
            raise self.error
        return super().prepare(batch, prev)


class EngineThread:
    """The engine's loop in a thread of this process."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config

    def start(self, to_engine: str, from_engine: str, on_exit: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()

        def run() -> None:
            with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as outbox:
                inbox.connect(to_engine)
                outbox.connect(from_engine)
                outbox.setsockopt(zmq.LINGER, 1000)
                process._Loop(self._config, inbox, outbox).run()
            loop.call_soon_threadsafe(on_exit, "the engine's thread ended")

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._thread.join(60)


def test_requests_get_500_and_health_503(
    make_live: Any, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Fragile()
    monkeypatch.setattr(process, "EngineCore", lambda config: EngineCore(config, backend))
    config = EngineConfig(model=str(model), load_format="dummy", progress=False, max_seqs=3)
    with make_live(EngineThread(config)) as live, ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(httpx.post, live.url + "/v1/completions", json=BODY, timeout=60) for _ in range(5)]
        live.wait(lambda: (live.server.client.stats.running, live.server.client.stats.waiting) == (3, 2))
        assert live.http.get("/health").status_code == 200
        backend.error = DeviceLost("CUDA error: an illegal memory access was encountered")
        answers = [(a.result().status_code, a.result().json()["error"]["message"]) for a in asked]
        told = str(backend.error)
        assert sorted(answers) == [(500, f"DeviceLost: {told}")] * 3 + [(503, told)] * 2
        health = live.http.get("/health")
        assert (health.status_code, health.json()["error"]["message"]) == (503, told)
        assert live.error("/v1/completions", BODY)[0] == 503
    traces = [r for r in caplog.records if r.levelno == logging.ERROR and r.exc_info]
    assert [r.getMessage().partition(", after")[0] for r in traces] == ["a step of 3 tokens and 3 requests failed"]


def test_other_errors_end_their_requests_alone(make_live: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Fragile()
    monkeypatch.setattr(process, "EngineCore", lambda config: EngineCore(config, backend))
    with make_live(EngineThread(EngineConfig(model=str(model), load_format="dummy", progress=False))) as live:
        backend.error = MemoryError("2 GB are missing")
        status, error = live.error("/v1/completions", BODY)
        assert (status, "lower mem_fraction" in error["message"]) == (500, True)
        backend.error = None
        assert live.post("/v1/completions", BODY | {"max_tokens": 9}).status_code == 200
        assert live.http.get("/health").status_code == 200
        backend.error = DeviceLost("the end")  # ends the loop
        live.error("/v1/completions", BODY)
