"""`penstock.common.tracing` over the OpenTelemetry SDK. Importing this needs the ``otel`` extra."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from penstock.common.tracing import TRACEPARENT_KEY, Attributes

__all__ = ["OtelRecorder"]

_PROPAGATOR = TraceContextTextMapPropagator()
_LAST_SPANS_SECONDS = 1.0


class OtelRecorder:
    """Records into a provider of its own: another library's global one is left alone."""

    def __init__(self, service_name: str, endpoint: str | None, exporter: SpanExporter | None) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": service_name}), shutdown_on_exit=False)
        self._provider.add_span_processor(SimpleSpanProcessor(exporter) if exporter else _to_collector(endpoint))
        self._tracer = self._provider.get_tracer("penstock")

    def start(self, name: str, parent: str, attributes: Attributes | None, at_ns: int | None) -> OtelSpan:
        # An empty carrier extracts to an empty context: a root, whatever another library's current span is.
        carrier = {TRACEPARENT_KEY: parent} if parent else {}
        above = _PROPAGATOR.extract(carrier, context=trace.set_span_in_context(trace.INVALID_SPAN))
        return OtelSpan(self._tracer.start_span(name, above, attributes=attributes, start_time=at_ns))

    def shutdown(self) -> None:
        # It goes on to try a collector that is away for up to half a minute; who leaves does not wait for that.
        sending = threading.Thread(target=self._provider.shutdown, name="last-spans", daemon=True)
        sending.start()
        sending.join(_LAST_SPANS_SECONDS)


class OtelSpan:
    """`penstock.common.tracing.Span`."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
        self.traceparent = carrier[TRACEPARENT_KEY]

    def set(self, attributes: Attributes) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        self._span.add_event(name, attributes)

    def end(self, *, error: str | None = None, at_ns: int | None = None) -> None:
        if not self._span.is_recording():
            return
        if error is not None:
            self._span.set_status(trace.StatusCode.ERROR, error)
        self._span.end(at_ns)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self.end(error=None if kind is None else kind.__name__)


def _to_collector(endpoint: str | None) -> SpanProcessor:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))
