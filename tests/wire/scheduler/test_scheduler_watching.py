"""What a scheduler shows to who watches it, and of its settings."""

import itertools

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from scheduler_wire import Executor, Gateway, eventually, pools, scheduler, served, stub_of

from penstock.common import tracing
from penstock.common.service import StartError
from penstock.internal.v1 import scheduler_pb2 as pb
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.server import SchedulerServer


async def test_metrics_tell_queue_leases_and_outcomes():
    config = {"metrics": "127.0.0.1:0", "executor_wait_seconds": 0.05}
    async with scheduler(**config) as (address, server), stub_of(address) as stub, httpx.AsyncClient() as http:
        await Executor(stub, max_batch_size=1).ready()
        gateway = Gateway(stub)
        gateway.place(1)
        await gateway.grant()
        gateway.place(2)
        gateway.place(3, model="client's invention")
        await gateway.refusal()
        text = (await http.get(f"http://{server._metrics.address}/metrics")).text
    for line in (
        'penstock_scheduler_requests_waiting{model_name="m"} 1.0',
        'penstock_scheduler_queue_time_seconds_count{model_name="m"} 1.0',
        'penstock_scheduler_placements_total{model_name="m",outcome="granted"} 1.0',
        'penstock_scheduler_executors{model_name="m",role="both",state="live"} 1.0',
        'penstock_scheduler_leases{executor_id="e1"} 1.0',
        'penstock_scheduler_placed_total{how="together",model_name="m",reason="no_prefill_executor"} 1.0',
        "penstock_scheduler_kv_event_gaps_total 0.0",
    ):
        assert line in text
    assert "invention" not in text


async def test_queue_time_is_a_span_of_the_request():
    theirs = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    exporter = InMemorySpanExporter()
    async with served() as stub:
        tracing.configure("scheduler", exporter=exporter)
        await Executor(stub).ready()
        gateway = Gateway(stub)
        gateway.place(1, traceparent=theirs)
        await gateway.grant()
        gateway.place(2, traceparent=theirs, fields=["sampling.min_p"])
        await gateway.refusal()
    tracing.shutdown()
    granted, refused = exporter.get_finished_spans()
    assert granted.name == "queue"
    assert f"{granted.parent.span_id:016x}" == theirs.split("-")[2]
    assert granted.attributes["executor_id"] == "e1"
    assert refused.status.description == "unsupported"


async def test_queue_span_tells_what_is_expected_in_the_cache_of_the_executor_that_prefills():
    exporter, hashes = InMemorySpanExporter(), bytes(range(64))
    async with served(placement="apart") as stub:
        tracing.configure("scheduler", exporter=exporter)
        prefill, _ = await pools(stub)
        prefill.send(pb.RegisterRequest(kv_events=pb.KvEvents(sequence=1, stored=hashes)))
        gateway, ids = Gateway(stub), itertools.count(1)

        async def known():
            gateway.place(next(ids), prompt_tokens=200, block_hashes=hashes)
            lease = await gateway.grant()
            gateway.send(pb.PlaceRequest(released=[lease.request_id]))
            return lease.prefill.tokens == 200 - 128

        await eventually(known)
    tracing.shutdown()
    last = exporter.get_finished_spans()[-1]
    assert (last.attributes["prefill_executor_id"], last.attributes["expected_cached_tokens"]) == ("p", 128)


@pytest.mark.parametrize(
    "wrong", [{"lease_seconds": 0.05}, {"max_queued_requests": -1}, {"prefill_weight": float("nan")}, {"placement": "best"}]
)
async def test_settings_that_can_not_work_are_named(wrong):
    with pytest.raises(StartError, match=next(iter(wrong))):
        await SchedulerServer(SchedulerConfig(**wrong)).start()
