"""Where a request's time went, as spans of one trace that the executor goes on with."""

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from penstock.common import tracing
from penstock.v1 import inference_pb2


@pytest.fixture
def exporter():
    yield InMemorySpanExporter()
    tracing.shutdown()


async def test_spans_are_parts_of_the_callers_trace(suite, exporter):
    tracing.configure("gateway", exporter=exporter)
    request = inference_pb2.GenerateRequest(prompt={"text": "Tell me"}, stopping={"max_tokens": 9})
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    call = suite.inference.Generate(request, metadata=(("traceparent", traceparent), ("x-request-id", "mine")))
    answers = [m async for m in call]
    await suite.rest()
    spans = {s.name: s for s in exporter.get_finished_spans()}
    assert {"request", "encode", "place", "prefill", "decode"} <= set(spans)
    assert {format(s.context.trace_id, "032x") for s in spans.values()} == {"0af7651916cd43dd8448eb211c80319c"}
    whole = spans["request"]
    assert whole.attributes["completion_tokens"] == 9
    assert {spans[n].parent.span_id for n in ("encode", "place", "prefill", "decode")} == {whole.context.span_id}
    (start,) = suite.executors[0].all_started
    assert start.traceparent.split("-")[2] == format(whole.context.span_id, "016x")
    assert start.request_id == answers[-1].closing.request_id == "mine"
