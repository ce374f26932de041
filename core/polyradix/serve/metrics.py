"""What /metrics shows: the HTTP side's histograms, and the engine's own counters from its latest Stats."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from polyradix.serve.client import EngineClient

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)

_COUNTERS = {
    "prompt_tokens": "Prompt tokens of admitted requests",
    "cached_tokens": "Prompt tokens found in the prefix cache",
    "output_tokens": "Sampled tokens",
    "finished": "Requests the engine finished",
    "aborted": "Requests aborted in the engine",
    "preemptions": "Times a running request was put back because pages ran out",
    "refused": "Requests refused because the queue was full",
    "expired": "Requests ended by their timeout",
    "steps": "Engine steps",
    "step_seconds": "Wall time of engine steps",
    "host_seconds": "Wall time of engine steps not spent in kernels",
    "grammar_seconds": "Time spent on the masks of structured outputs",
    "jumped_tokens": "Output tokens that a grammar forced, appended without sampling",
}
_FIELDS = {"preemptions": "retracted"}
_GAUGES = {
    "running": "Requests running",
    "waiting": "Requests waiting",
    "pages_total": "KV pages",
    "pages_used": "KV pages held by running requests",
    "pages_cached": "KV pages held by the prefix cache alone",
}


class Metrics:
    """One registry per server, so that two servers in one process do not meet."""

    def __init__(self, client: EngineClient) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter("polyradix_requests", "Completions by how they ended", ["outcome"], registry=registry)
        self.errors = Counter("polyradix_errors", "HTTP error answers", ["status"], registry=registry)
        self.first_token = Histogram(
            "polyradix_time_to_first_token_seconds", "From request to first token", registry=registry, buckets=_SECONDS
        )
        self.inter_token = Histogram(
            "polyradix_inter_token_seconds", "Between tokens of a request", registry=registry, buckets=_TOKEN_SECONDS
        )
        self.queue = Histogram(
            "polyradix_queue_seconds", "From submission to the first step", registry=registry, buckets=_SECONDS
        )
        self._end_to_end = Histogram(
            "polyradix_request_seconds", "From request to last token", registry=registry, buckets=_SECONDS
        )
        registry.register(_Engine(client))

    def finished(self, outcome: str, seconds: float) -> None:
        self._requests.labels(outcome).inc()
        self._end_to_end.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _Engine(Collector):
    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterator[Metric]:
        stats = self._client.stats
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"polyradix_engine_{name}", text, value=getattr(stats, _FIELDS.get(name, name)))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"polyradix_engine_{name}", text, value=getattr(stats, name))
        rate = stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0
        yield GaugeMetricFamily("polyradix_engine_hit_rate", "Cached share of all prompt tokens", value=rate)
        usage = stats.pages_used / stats.pages_total if stats.pages_total else 0.0
        yield GaugeMetricFamily("polyradix_engine_token_usage", "Share of KV pages in use by requests", value=usage)
        up = float(self._client.ready is not None and not self._client.error)
        yield GaugeMetricFamily("polyradix_engine_up", "1 while the engine serves", value=up)
