"""`polyradix serve` as an operator runs it: keys, HTTPS, embeddings, spans, and its end."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trustme
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

TEXT, NATIVE, EMBED = "/v1/completions", "/generate", "/v1/embeddings"


class Process:
    """A running `polyradix serve` with the tiny model."""

    def __init__(self, model: Path, device: str, *options: str) -> None:
        args = ["serve", "--model", str(model), "--load-format", "dummy", "--device", device, "--port", "0", *options]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "polyradix.serve.cli", *args], stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        self.log = ""
        for line in self.process.stderr:
            self.log += line
            if "ready at" in line:
                self.url = line.partition("ready at ")[2].partition(": ")[0]
                return
        raise AssertionError(self.log)

    def metric(self, name: str) -> float:
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name + " "))

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        _, rest = self.process.communicate(timeout=30)
        self.log += rest
        assert self.process.returncode == 0, self.log
        assert "Traceback" not in self.log


@pytest.fixture
def run(model: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def run(device: str, *options: str) -> Process:
        made.append(Process(model, device, *options))
        return made[-1]

    yield run
    for process in made:
        process.close()


def test_embeddings_and_prompt_logprobs(run: Callable[..., Process]) -> None:
    server = run("numpy", "--embeddings", "mean", "--max-tokens-per-step", "64")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="x")
    texts = ["a", "some longer text", "a"]

    def embed() -> list[list[float]]:
        return [d.embedding for d in client.embeddings.create(model="", input=texts, extra_body={"model": None}).data]

    vectors = embed()
    assert [len(v) for v in vectors] == [32] * 3
    assert vectors[0] == vectors[2] != vectors[1]
    assert sum(x * x for x in vectors[1]) == pytest.approx(1)
    ids = list(b"the same prompt")
    body = {"input_ids": ids, "max_tokens": 8, "temperature": 0, "prompt_logprobs": 1, "logprobs": 1}
    first = httpx.post(server.url + NATIVE, json=body, timeout=30).json()
    whole = ids + first["output_ids"]
    again = httpx.post(server.url + NATIVE, json=body | {"input_ids": whole}, timeout=30).json()["prompt_logprobs"]
    assert again[: len(ids)] == first["prompt_logprobs"]
    assert again[0] is None
    said = [entry[0] for entry in first["logprobs"]]  # what decoding saw of these tokens is what a prompt sees
    assert [entry[0] for entry in again[len(ids) :]] == pytest.approx(said, abs=1e-4)
    with ThreadPoolExecutor(4) as pool:
        mixed = [pool.submit(embed), pool.submit(httpx.post, server.url + NATIVE, json=body), pool.submit(embed)]
    assert mixed[0].result() == mixed[2].result() == vectors
    assert mixed[1].result().json()["output_ids"] == first["output_ids"]
    assert server.metric("polyradix_queue_seconds_count") == 3
    assert server.metric("polyradix_engine_token_usage") == 0


def test_a_backend_without_masks_says_so(run: Callable[..., Process]) -> None:
    server = run("null")
    response = httpx.post(server.url + NATIVE, json={"input_ids": [1, 2], "prompt_logprobs": 0})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_drain(run: Callable[..., Process]) -> None:
    server = run("null", "--option", "step_time_s=0.02", "--api-key", "k", "--drain-timeout", "20")
    headers = {"Authorization": "Bearer k"}

    def ask(**kwargs: Any) -> httpx.Response:
        body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}
        return httpx.post(server.url + TEXT, json=body, headers=headers, timeout=30, **kwargs)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask)
        wait(lambda: server.metric("polyradix_engine_running") == 1)
        server.process.send_signal(signal.SIGTERM)
        wait(lambda: httpx.get(server.url + "/health").status_code == 503)
        refused = ask()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert running.result().json()["usage"]["completion_tokens"] == 100
    assert server.process.wait(20) == 0


def test_drain_has_an_end(run: Callable[..., Process]) -> None:
    server = run("null", "--option", "step_time_s=0.2", "--drain-timeout", "0.5")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, server.url + TEXT, json={"prompt": "x", "max_tokens": 400}, timeout=30)
        wait(lambda: server.metric("polyradix_engine_running") == 1)
        server.process.terminate()
        assert running.result().status_code == 503
    assert server.process.wait(20) == 0


def test_https(run: Callable[..., Process], tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    made.cert_chain_pems[0].write_to_path(cert)
    made.private_key_pem.write_to_path(key)
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    server = run("null", "--ssl-certfile", str(cert), "--ssl-keyfile", str(key))
    assert server.url.startswith("https://")
    assert httpx.get(server.url + "/health", verify=trusted).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https", "http") + "/health")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ssl-certfile", "/none.pem"], "ssl_certfile"),
        (["--ssl-keyfile", "/none.pem"], "ssl_keyfile"),
        (["--api-key-file", "/none.toml"], "api_key_file"),
    ],
)
def test_what_cannot_be_used_is_said_at_once(model: Path, options: list[str], said: str) -> None:
    args = ["serve", "--model", str(model), "--load-format", "dummy", "--device", "null", "--port", "0", *options]
    done = subprocess.run([sys.executable, "-m", "polyradix.serve.cli", *args], capture_output=True, text=True)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_spans(run: Callable[..., Process]) -> None:
    got: list[ExportTraceServiceRequest] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        server = run("null", "--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}/v1/traces")
        trace = os.urandom(16)
        headers = {"traceparent": f"00-{trace.hex()}-{'ab' * 8}-01"}
        body = {"prompt": "abc", "max_tokens": 5, "ignore_eos": True}
        assert httpx.post(server.url + TEXT, json=body, headers=headers).status_code == 200
        server.close()
        collector.shutdown()
    (span,) = [s for g in got for r in g.resource_spans for scope in r.scope_spans for s in scope.spans]
    found = {a.key: a.value for a in span.attributes}
    assert (span.trace_id, span.parent_span_id) == (trace, b"\xab" * 8)
    assert found["gen_ai.usage.input_tokens"].int_value == 3
    assert found["gen_ai.usage.output_tokens"].int_value == 5
    assert found["gen_ai.server.time_to_first_token"].double_value > 0
    assert span.end_time_unix_nano - span.start_time_unix_nano >= 1e9 * found["polyradix.queue_seconds"].double_value


def wait(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)
