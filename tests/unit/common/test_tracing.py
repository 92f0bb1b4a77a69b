import asyncio
import threading

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from penstock.common import tracing
from penstock.common.server import GrpcServer


@pytest.fixture
def spans():
    exporter = InMemorySpanExporter()
    assert tracing.configure("test", exporter=exporter)
    yield exporter.get_finished_spans
    tracing.shutdown()


@pytest.fixture
def untraced(monkeypatch):
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert not tracing.configure("test")


def test_nested_spans_share_a_trace_and_tell_facts(spans):
    with tracing.span("request", attributes={"model": "m"}) as outer, tracing.span("prefill") as inner:
        inner.set({"tokens": 7})
        inner.event("first token")
        assert tracing.metadata() == (("traceparent", inner.traceparent),)
    assert tracing.metadata() == ()
    prefill, request = spans()
    assert (prefill.name, request.name) == ("prefill", "request")
    assert prefill.parent.span_id == request.context.span_id
    assert prefill.attributes["tokens"] == 7
    assert [event.name for event in prefill.events] == ["first token"]
    assert request.attributes["model"] == "m"
    assert request.resource.attributes["service.name"] == "penstock-test"
    assert outer.traceparent.split("-")[1] == f"{request.context.trace_id:032x}"


def test_span_of_another_service_continues_by_its_traceparent(spans):
    theirs = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    tracing.start("queue", theirs, at_ns=1_000).end(at_ns=5_000)
    (queue,) = spans()
    assert f"{queue.context.trace_id:032x}" == theirs.split("-")[1]
    assert f"{queue.parent.span_id:016x}" == theirs.split("-")[2]
    assert (queue.start_time, queue.end_time) == (1_000, 5_000)


def test_malformed_traceparent_from_outside_starts_a_new_trace(spans):
    tracing.start("queue", "no traceparent").end()
    assert spans()[0].parent is None


def test_exception_marks_the_span_failed_by_its_kind_not_its_text(spans):
    with pytest.raises(ValueError, match="secret"), tracing.span("prefill"):
        raise ValueError("secret")
    (prefill,) = spans()
    assert prefill.status.description == "ValueError"


def test_what_comes_after_the_end_is_ignored(spans):
    begun = tracing.start("decode")
    begun.end(error="lost")
    begun.end()
    assert [s.status.description for s in spans()] == ["lost"]


def test_without_exporter_nothing_is_recorded_and_a_traceparent_passes_through(untraced):
    assert not tracing.enabled()
    with tracing.span("request", "00-aa-bb-01") as outer:
        outer.set({"tokens": 1})
        assert tracing.metadata() == ((tracing.TRACEPARENT_KEY, "00-aa-bb-01"),)
    assert tracing.metadata() == ()
    assert tracing.start("a") is tracing.start("b")


def test_endpoint_without_the_extra_warns_and_goes_on(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "penstock.common._otel", None)
    assert not tracing.configure("test", "http://127.0.0.1:4317")
    assert not tracing.enabled()


async def test_traceparent_travels_in_metadata_of_each_call_alone(spans):
    async def handle(request, context):
        with tracing.span("served"):
            await asyncio.sleep(0)
        return b""

    handlers = grpc.method_handlers_generic_handler("t.S", {"Do": grpc.unary_unary_rpc_method_handler(handle)})
    server = GrpcServer(interceptors=[tracing.Traceparents()])
    server.add(lambda _, s: s.add_generic_rpc_handlers((handlers,)), None, "t.S")
    address = server.listen("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            call = channel.unary_unary("/t.S/Do")
            with tracing.span("client"):
                await call(b"", metadata=tracing.metadata())
            await call(b"")
    finally:
        await server.stop(0)
    served, client, alone = spans()
    assert served.parent.span_id == client.context.span_id
    assert alone.parent is None


def test_who_leaves_does_not_wait_for_a_collector_that_is_away():
    """An exporter goes on to try it for up to half a minute."""
    tried, answered = threading.Event(), threading.Event()

    class Away(InMemorySpanExporter):
        def shutdown(self):
            tried.set()
            answered.wait()

    tracing.configure("gateway", exporter=Away())
    tracing.shutdown()
    assert tried.is_set()
    assert not tracing.enabled()
    answered.set()
