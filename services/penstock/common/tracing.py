"""OpenTelemetry spans through the suite. Without an exporter's endpoint, or without the ``otel`` extra, all of it does nothing.

A span's identity travels between services as a W3C ``traceparent``: in gRPC metadata (`metadata`, `Traceparents`), or in a field
of a multiplexed stream's message, where one call serves many requests.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import grpc
import grpc.aio

from penstock.common.logs import logger
from penstock.common.service import StartError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

__all__ = [
    "TRACEPARENT_KEY",
    "Span",
    "Traceparents",
    "configure",
    "enabled",
    "metadata",
    "shutdown",
    "span",
    "start",
    "traceparent_of",
]

TRACEPARENT_KEY = "traceparent"
# Version 00 of W3C's trace context: trace id and span id are never all zero.
_TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

Attributes = Mapping[str, str | bool | int | float]


class Span(Protocol):
    """Something that takes a while. As a context manager it ends itself, failed if an exception leaves it."""

    traceparent: str

    def set(self, attributes: Attributes) -> None:
        """Add facts."""

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Note a moment."""

    def end(self, *, error: str | None = None, at_ns: int | None = None) -> None:
        """End it, now or at a Unix time, failed if an error is told. What comes after the first end is ignored."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None: ...


class _Nothing:
    """The span of a process that traces nothing. It passes the caller's traceparent on, for services that do trace."""

    __slots__ = ("traceparent",)

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent

    def set(self, attributes: Attributes) -> None:
        pass

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        pass

    def end(self, *, error: str | None = None, at_ns: int | None = None) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        pass


_COLLECTOR = re.compile(r"https?://[^\s/]+/?|[^\s/]+:\d+")
_NOTHING = _Nothing()
_current: ContextVar[str] = ContextVar("traceparent", default="")


class _Recorder(Protocol):
    def start(self, name: str, parent: str, attributes: Attributes | None, at_ns: int | None) -> Span: ...

    def shutdown(self) -> None: ...


class _State:
    """What this process records with, if it does."""

    recorder: _Recorder | None = None


def configure(service_name: str, endpoint: str | None = None, *, exporter: SpanExporter | None = None) -> bool:
    """Begin to record this process's spans, if there is where to send them; else leave all as it is.

    What is recorded is sent in the background, and by `shutdown`.

    Args:
        service_name: the spans' ``service.name``.
        endpoint: URL of an OTLP collector that speaks gRPC; None takes ``OTEL_EXPORTER_OTLP_ENDPOINT``, and nothing is recorded
            where that is not set either.
        exporter: where spans go instead, one by one as they end.

    Returns:
        whether spans are recorded.

    Raises:
        StartError: the endpoint is none.
    """
    if exporter is None and not (endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")):
        return False
    if endpoint and not _COLLECTOR.fullmatch(endpoint):
        raise StartError(f"otlp_endpoint: {endpoint!r} is no collector: give http://HOST:PORT, https://HOST:PORT or HOST:PORT")
    try:
        from penstock.common._otel import OtelRecorder
    except ImportError as error:
        logger().warning("no spans are recorded: install penstock[otel]", missing=error.name)
        return False
    shutdown()
    _State.recorder = OtelRecorder(f"penstock-{service_name}", endpoint, exporter)
    return True


def enabled() -> bool:
    """Whether spans are recorded."""
    return _State.recorder is not None


def shutdown() -> None:
    """Send what is recorded, for a second at most, and stop recording. Idempotent."""
    recorder, _State.recorder = _State.recorder, None
    if recorder is not None:
        recorder.shutdown()


def start(name: str, parent: str | None = None, attributes: Attributes | None = None, *, at_ns: int | None = None) -> Span:
    """Begin a span that the caller ends, in whatever task or thread.

    Args:
        name: of the work, such as ``queue``.
        parent: traceparent of the span that this one is part of; None takes the task's current one, ``""`` none at all.
        attributes: facts about it.
        at_ns: Unix time of the begin, for what is told afterwards.
    """
    above = _current.get() if parent is None else parent
    recorder = _State.recorder
    if recorder is None:
        return _Nothing(above) if above else _NOTHING
    return recorder.start(name, above, attributes, at_ns)


@contextmanager
def span(name: str, parent: str | None = None, attributes: Attributes | None = None) -> Iterator[Span]:
    """A span around a block, which is the task's current one meanwhile."""
    with start(name, parent, attributes) as begun:
        token = _current.set(begun.traceparent)
        try:
            yield begun
        finally:
            _current.reset(token)


def traceparent_of(given: str | bytes | None) -> str:
    """A caller's traceparent; nothing where it is none. What a caller sends ends up in other calls' metadata."""
    text = given.decode("latin-1") if isinstance(given, bytes) else given or ""
    return text if _TRACEPARENT.fullmatch(text) else ""


def metadata() -> tuple[tuple[str, str], ...]:
    """What a gRPC call to another service bears so that its spans are part of the current one."""
    current = _current.get()
    return ((TRACEPARENT_KEY, current),) if current else ()


class Traceparents(grpc.aio.ServerInterceptor):
    """Makes the caller's traceparent the current one of each call."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        for key, value in handler_call_details.invocation_metadata or ():
            if key == TRACEPARENT_KEY:
                _current.set(traceparent_of(value))
        return await continuation(handler_call_details)
