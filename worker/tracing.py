"""Traces over OpenTelemetry: one from a request's HTTP span to the phases of its video. No torch, no HTTP framework.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT (or OTEL_TRACES_EXPORTER) is set and the extra `otel` installed; what is called
here then does nothing, in microseconds. FastAPI makes the HTTP spans itself, from `provider()`. What the service writes
into a job's record is the `traceparent` of its span, and the worker goes on from there, whenever that is.

No prompt may be an attribute, and no message of an exception, which may quote one.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import trace
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

log = logging.getLogger(__name__)

_PROPAGATOR = TraceContextTextMapPropagator()
_EXPORTERS = ("otlp", "console")
_PATIENCE_S = 3
_provider: trace.TracerProvider | None = None


def configure(program: str) -> None:
    """Send spans where the usual OTEL_ variables say, under the name ``fastlightgen-{program}``. Once, at start.

    A trace is no reason not to serve: what cannot be is said in the log, and nothing is traced.
    """
    if (exporter := _wanted()) is None:
        return
    if not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
        return  # `opentelemetry-instrument` has seen to everything
    if exporter not in _EXPORTERS:
        log.warning("OTEL_TRACES_EXPORTER=%s: there are %s; nothing is traced", exporter, ", ".join(_EXPORTERS))
        return
    try:
        use(_sdk_provider(program, exporter))
    except ImportError as error:
        log.warning("traces are asked for (OTEL_...) and %s is not installed: add the extra `otel`", error.name)


def _wanted() -> str | None:
    """The exporter that the environment asks for, or None."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    named = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if named:
        return None if named == "none" else named
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    return "otlp" if any(os.environ.get(name) for name in endpoints) else None


def _sdk_provider(program: str, exporter: str) -> trace.TracerProvider:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter

    def make_exporter() -> SpanExporter:
        if exporter == "console":
            return ConsoleSpanExporter()
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        # An exporter tries again for so long before it gives up, at the end of the process too.
        return OTLPSpanExporter(timeout=None if os.environ.get("OTEL_EXPORTER_OTLP_TIMEOUT") else _PATIENCE_S)

    name = os.environ.get("OTEL_SERVICE_NAME") or f"fastlightgen-{program}"
    provider = TracerProvider(resource=Resource.create({"service.name": name}))
    provider.add_span_processor(BatchSpanProcessor(make_exporter()))
    return provider


def use(provider: trace.TracerProvider | None) -> None:
    """Have this provider make the spans; None leaves it to OpenTelemetry's global one, which is none by itself."""
    global _provider
    _provider = provider


def provider() -> trace.TracerProvider | None:
    """What makes the spans, for `FastAPI(telemetry={"tracer_provider": ...})`."""
    return _provider


def flush() -> None:
    """Send what has not been sent yet: for the end of a process that Python does not see, such as one by a signal."""
    if (send := getattr(_provider, "force_flush", None)) is not None:
        send()


def current_traceparent() -> str | None:
    """The present span as a W3C `traceparent`; None outside of any."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def consumer_span(traceparent: str | None, name: str, **attributes: str | int) -> Iterator[None]:
    """Work that somebody else asked for: a span that goes on with their trace, or begins one.

    Args:
        traceparent: what ``current_traceparent`` said over there.
        name: of the span.
        attributes: what it is about; `flg.` is put before each.
    """
    with trace.get_tracer("fastlightgen", tracer_provider=_provider).start_as_current_span(
        name,
        context=_PROPAGATOR.extract({"traceparent": traceparent} if traceparent else {}),
        kind=SpanKind.CONSUMER,
        attributes={f"flg.{key}": value for key, value in attributes.items()},
        record_exception=False,
        set_status_on_exception=False,
    ):
        try:
            yield
        except BaseException as error:
            note_failure(type(error).__name__)
            raise


def note_failure(code: str) -> None:
    """Mark the present span as failed; ``code`` is an error's, never its message."""
    span = trace.get_current_span()
    span.set_attribute("error.type", code)
    span.set_status(Status(StatusCode.ERROR))


def phase_spans(timings_s: Mapping[Any, float], ended_at: float | None = None) -> None:
    """Children of the present span for phases that were timed and are over, one after another.

    Args:
        timings_s: name and seconds of each, in their order.
        ended_at: when the last one was over, in seconds since the epoch; now unless it is given.
    """
    if not trace.get_current_span().is_recording():
        return
    tracer = trace.get_tracer("fastlightgen", tracer_provider=_provider)
    end = time.time() if ended_at is None else ended_at
    start_s = end - sum(timings_s.values())
    for phase, seconds in timings_s.items():
        span = tracer.start_span(str(phase), start_time=_nanoseconds(start_s))
        start_s += seconds
        span.end(_nanoseconds(start_s))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
