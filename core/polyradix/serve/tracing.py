"""OpenTelemetry spans, one a request, when an endpoint is given. The SDK is the extra `otel` and is imported late.

Attributes are named as the semantic conventions for generative AI do (opentelemetry.io/docs/specs/semconv/gen-ai).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

_provider: Any = None


def start(endpoint: str) -> None:
    """Spans go to an OTLP/HTTP endpoint from now on. Raises ImportError saying what to install."""
    global _provider
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ImportError(f"--otlp-endpoint needs OpenTelemetry: pip install 'polyradix[otel]' ({error})") from None
    _provider = TracerProvider(resource=Resource.create({"service.name": "polyradix"}))
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))


def stop() -> None:
    """Sends what is left."""
    if _provider is not None:
        _provider.shutdown()


def span(name: str, seconds: float, headers: Mapping[str, str], attributes: Mapping[str, Any]) -> None:
    """A span that took `seconds` and ends now, in the trace that `headers` (traceparent, tracestate) name."""
    if _provider is None:
        return
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract(dict(headers))
    end = time.time_ns()
    begin = end - int(seconds * 1e9)
    made = _provider.get_tracer("polyradix").start_span(name, context, attributes=attributes, start_time=begin)
    made.end(end)
