"""`polyradix serve` as an operator runs it: keys, HTTPS, embeddings, spans, and its end."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import openai
import pytest
import trustme
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from served import Process, wait

TEXT, NATIVE, EMBED = "/v1/completions", "/generate", "/v1/embeddings"


@pytest.fixture
def run(model: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def run(device: str, *options: str) -> Process:
        made.append(Process(model, device, *options))
        return made[-1]

    yield run
    for process in made:
        process.close()
        assert process.process.returncode == 0, process.log
        assert "Traceback" not in process.log


def test_embeddings_and_prompt_logprobs(run: Callable[..., Process]) -> None:
    server = run("numpy", "--embeddings", "mean", "--max-tokens-per-step", "64")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
    texts = ["a", "some longer text", "a"]

    def embed() -> list[list[float]]:
        return [d.embedding for d in client.embeddings.create(model="", input=texts, extra_body={"model": None}).data]

    vectors = embed()
    assert [len(v) for v in vectors] == [32] * 3
    assert vectors[0] == vectors[2] != vectors[1]
    assert sum(x * x for x in vectors[1]) == pytest.approx(1)
    ids = list(b"the same prompt")
    body = {"input_ids": ids, "max_tokens": 8, "temperature": 0, "prompt_logprobs": 1, "logprobs": 1}
    first = server.http.post(NATIVE, json=body).json()
    whole = ids + first["output_ids"]
    again = server.http.post(NATIVE, json=body | {"input_ids": whole}).json()["prompt_logprobs"]
    assert again[: len(ids)] == first["prompt_logprobs"]
    assert again[0] is None
    said = [entry[0] for entry in first["logprobs"]]  # what decoding saw of these tokens is what a prompt sees
    assert [entry[0] for entry in again[len(ids) :]] == pytest.approx(said, abs=1e-4)
    with ThreadPoolExecutor(4) as pool:
        mixed = [pool.submit(embed), pool.submit(server.http.post, NATIVE, json=body), pool.submit(embed)]
    assert mixed[0].result() == mixed[2].result() == vectors
    assert mixed[1].result().json()["output_ids"] == first["output_ids"]
    assert server.metrics()["polyradix_queue_seconds_count"] == 3
    wait(lambda: server.metrics()["polyradix_engine_token_usage"] == 0)


def test_a_backend_without_masks_says_so(run: Callable[..., Process]) -> None:
    server = run("null")
    response = server.http.post(NATIVE, json={"input_ids": [1, 2], "prompt_logprobs": 0})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_drain(run: Callable[..., Process]) -> None:
    server = run("null", "--option", "step_time_s=0.02", "--api-key", "k", "--drain-timeout", "60")
    server.http.headers["Authorization"] = "Bearer k"
    body = {"prompt": "x", "max_tokens": 100, "ignore_eos": True}
    engine = server.engine_pid
    with server.http.stream("POST", TEXT, json=body | {"stream": True}) as running:
        lines = running.iter_lines()
        next(lines)
        os.kill(engine, signal.SIGSTOP)  # the request runs for as long as it is needed
        server.process.send_signal(signal.SIGTERM)
        wait(lambda: server.http.get("/health").status_code == 503)
        refused = server.http.post(TEXT, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        os.kill(engine, signal.SIGCONT)
        events = [line for line in lines if line]
    assert json.loads(events[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert events[-1] == "data: [DONE]"
    assert server.process.wait(60) == 0


def test_drain_has_an_end(run: Callable[..., Process]) -> None:
    server = run("null", "--option", "step_time_s=0.2", "--drain-timeout", "0.5")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.http.post, TEXT, json={"prompt": "x", "max_tokens": 400})
        wait(lambda: server.metrics()["polyradix_engine_running"] == 1)
        server.process.terminate()
        assert running.result().status_code == 503
    assert server.process.wait(60) == 0


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
    assert httpx.get(server.url + "/health", verify=trusted, timeout=60).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https", "http") + "/health", timeout=60)


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
        assert server.http.post(TEXT, json=body, headers=headers).status_code == 200
        server.close()
        collector.shutdown()
    (span,) = [s for g in got for r in g.resource_spans for scope in r.scope_spans for s in scope.spans]
    found = {a.key: a.value for a in span.attributes}
    assert (span.trace_id, span.parent_span_id) == (trace, b"\xab" * 8)
    assert found["gen_ai.usage.input_tokens"].int_value == 3
    assert found["gen_ai.usage.output_tokens"].int_value == 5
    assert found["gen_ai.server.time_to_first_token"].double_value > 0
    assert span.end_time_unix_nano - span.start_time_unix_nano >= 1e9 * found["polyradix.queue_seconds"].double_value
