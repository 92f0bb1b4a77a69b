"""A request whose prefill runs on one executor and whose decoding on another: what goes over the wire, and what clients see."""

import asyncio
import json

import grpc
import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from penstock.client import AsyncClient, Fallback, PlacementReason
from penstock.common import tracing
from penstock.internal.v1 import executor_pb2
from penstock.v1 import inference_pb2

PARTS = ("encode", "queue", "prefill", "hops", "text")


def request(tokens=60, **fields):
    return inference_pb2.GenerateRequest(
        prompt={"text": "Tell me"}, stopping={"max_tokens": tokens}, reporting={"token_ids": True}, sampling={"seed": 5}, **fields
    )


async def read(call):
    answers = []
    while (answer := await call.read()) is not grpc.aio.EOF:
        answers.append(answer)
    return answers


async def answered(suite, call, tokens=60, n=1):
    """The closing of a call that told the story, each token once."""
    answers = await read(call)
    for index in range(n):
        assert bytes(i for m in answers if m.index == index for i in m.token_ids) == suite.story.encode()[:tokens]
    await suite.rest()
    return answers[-1].closing


@pytest.fixture
async def apart(suite_with):
    """Two executors: the first one decodes and the second one prefills. A third is there for what is lost."""
    async with suite_with(executors=3) as up:
        up.scheduler.apart = True
        up.decode, up.prefill, up.third = up.executors
        yield up


@pytest.mark.parametrize("n", [1, 3])
async def test_only_the_first_choice_is_handed_over_and_the_closing_tells_of_it(apart, n):
    wanted = request(n=n)
    wanted.reporting.prompt_logprobs = 1
    wanted.reporting.logprobs = 1
    closing = await answered(apart, apart.inference.Generate(wanted), n=n)
    receiving, *together = apart.decode.all_started
    (sending,) = apart.prefill.all_started
    assert receiving.receive.prefill_executor_id == apart.prefill.name
    assert [s.WhichOneof("handoff") for s in together] == [None] * (n - 1)
    assert sending.send.ticket.handoff_id == f"{apart.decode.name}/{receiving.sequence_id}".encode()
    assert (sending.send.ticket.tokens, sending.send.ticket.lease_ms) == (7, 1)
    assert (sending.executor_id, receiving.executor_id) == (apart.prefill.name, apart.decode.name)
    assert sending.HasField("prompt_logprobs")
    assert not receiving.HasField("prompt_logprobs")
    assert sending.sampling == receiving.sampling
    assert (closing.prefill_executor_id, closing.decode_executor_id) == (apart.prefill.name, apart.decode.name)
    assert closing.placement_reason == inference_pb2.PLACEMENT_REASON_COST
    assert (closing.handoff.kv_bytes, closing.handoff.transport, closing.handoff.native) == (4096, "grpc", True)
    assert (closing.handoff.transfer_time.nanos, closing.handoff.exposed_time.nanos) == (2_000_000, 1_000_000)
    assert (closing.fallback, closing.fallback_reason) == (inference_pb2.FALLBACK_NONE, "")
    assert closing.usage.cached_tokens == 2


async def test_the_python_client_and_http_tell_the_same(apart):
    async with AsyncClient(apart.grpc) as client:
        told = (await client.generate("Tell me", max_tokens=9).result()).closing
    assert (told.prefill_executor_id, told.decode_executor_id) == (apart.prefill.name, apart.decode.name)
    assert (told.placement_reason, told.fallback, told.fallback_reason) == (PlacementReason.COST, Fallback.NONE, "")
    assert (told.handoff.kv_bytes, told.handoff.transfer_seconds, told.handoff.exposed_seconds) == (4096, 0.002, 0.001)
    async with httpx.AsyncClient(base_url=apart.http) as client:
        body = {"prompt": ["Tell me", "more"], "max_tokens": 9}
        closings = (await client.post("/v1/completions", json=body)).json()["closings"]
        assert len(closings) == 2
        for closing in closings:
            assert closing["handoff"]["kv_bytes"] == 4096
            assert (closing["prefill_executor_id"], closing["decode_executor_id"]) == (apart.prefill.name, apart.decode.name)
            assert (closing["placement_reason"], closing["fallback"], closing["fallback_reason"]) == ("cost", "none", "")
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        streamed = await client.post("/v1/completions", json={**body, **usage})
        assert streamed.text.count('"closings":') == 1
        closings += next(json.loads(line[6:])["closings"] for line in streamed.text.splitlines() if '"closings":' in line)
        metrics = (await client.get("/metrics")).text
    assert 'penstock_requests_placed_total{how="apart",model_name="story",reason="cost"} 5.0' in metrics
    part_seconds = 'penstock_time_to_first_token_part_seconds_{}{{model_name="story",part="{}"}} '
    for part in ("encode", "queue", "prefill", "hops", "text", "transfer", "first_step"):
        assert part_seconds.format("count", part) + "5.0" in metrics
    before = [float(metrics.split(part_seconds.format("sum", part))[1].split()[0]) for part in PARTS]
    assert sum(before) == pytest.approx(told.first_text_seconds + sum(c["first_text_seconds"] for c in closings), abs=1e-4)
    await apart.rest()


async def test_a_failed_handoff_is_computed_again_where_the_request_decodes(apart):
    for failing in (apart.prefill, apart.decode):
        failing.fail_handoffs = executor_pb2.HANDOFF_FAILURE_LEASE_EXPIRED
        closing = await answered(apart, apart.inference.Generate(request(n=2)), n=2)
        failing.fail_handoffs = None
        assert closing.fallback == inference_pb2.FALLBACK_RECOMPUTE_ON_DECODE
        assert closing.fallback_reason == "lease_expired"
        assert closing.prefill_executor_id == closing.decode_executor_id == apart.decode.name
        assert not closing.HasField("handoff")
        assert closing.replacements == 0
    async with httpx.AsyncClient(base_url=apart.http) as client:
        metrics = (await client.get("/metrics")).text
    assert 'penstock_fallbacks_total{model_name="story",reason="lease_expired"} 2.0' in metrics


async def test_a_prefill_executor_that_refuses_or_dies_is_done_without(apart):
    apart.prefill.refuse = 1
    assert (await answered(apart, apart.inference.Generate(request()))).fallback_reason == "prefill_refused"
    apart.prefill.gate.clear()
    call = apart.inference.Generate(request())
    await apart.eventually(lambda: len(apart.prefill.all_started) == 2)
    await apart.prefill.kill()
    assert (await answered(apart, call)).fallback_reason == "prefill_lost"
    assert apart.decode.all_started[-1].WhichOneof("handoff") is None
    assert len(apart.scheduler.placings) == 2, "neither was placed again"


async def test_a_prefill_executor_that_stalls_is_left_when_the_scheduler_tells(apart):
    apart.prefill.gate.clear()
    call = apart.inference.Generate(request())
    await apart.prefill.started.wait()
    await apart.scheduler.tell_lost(apart.prefill)
    assert (await answered(apart, call)).fallback_reason == "prefill_lost"


async def test_a_first_token_of_a_prefill_executor_that_dies_is_replayed(apart):
    """It has told the token, and the KV never comes."""
    apart.prefill.die_after = 1
    closing = await answered(apart, apart.inference.Generate(request()))
    assert closing.fallback_reason == "prefill_lost"
    assert len(apart.decode.all_started[-1].replayed_ids) <= 1
    assert [p.executor_id for p in closing.placements] == [apart.decode.name, apart.prefill.name]


async def test_a_decode_executor_that_dies_is_replaced_and_the_request_may_run_apart_again(apart):
    apart.decode.die_after = 6
    closing = await answered(apart, apart.inference.Generate(request(n=2)), n=2)
    assert (closing.fallback, closing.fallback_reason) == (inference_pb2.FALLBACK_REPLACED, "decode_lost")
    assert closing.replacements == 1
    assert (closing.prefill_executor_id, closing.decode_executor_id) == (apart.third.name, apart.prefill.name)
    replacing = apart.scheduler.placings[1]
    assert list(replacing.avoid_executor_ids) == [apart.decode.name]
    replayed = max(len(s.replayed_ids) for s in apart.prefill.all_started if s.WhichOneof("handoff") != "send")
    assert replayed
    assert (replacing.prompt_tokens, replacing.max_tokens) == (7 + replayed, 60 - replayed)


async def test_a_decode_executor_that_refuses_is_replaced(apart):
    apart.decode.refuse = 1
    assert (await answered(apart, apart.inference.Generate(request()))).fallback_reason == "decode_refused"


async def test_a_restarted_scheduler_is_told_of_the_prefill_half_while_it_is_held(apart):
    apart.prefill.gate.clear()
    call = apart.inference.Generate(request())
    await apart.prefill.started.wait()
    for still_held in (True, False):
        apart.scheduler.announced_any.clear()
        await apart.scheduler.kill()
        await apart.scheduler.start()
        await apart.scheduler.announced_any.wait()
        lease = apart.scheduler.announced[-1]
        assert lease.HasField("prefill") is still_held
        if still_held:
            assert (lease.prefill.executor_id, lease.prefill.address, lease.prefill.tokens) == (
                apart.prefill.name,
                apart.prefill.address,
                7,
            )
            apart.decode.hold_after = apart.decode.frames + 1
            apart.prefill.gate.set()
            await call.read()
            await apart.eventually(lambda: not apart.prefill.running)
    apart.decode.gate.set()
    await read(call)
    await apart.rest()


@pytest.mark.parametrize("stage", ["reserving", "prefilling", "decoding"])
@pytest.mark.parametrize("end", ["cancel", "deadline"])
async def test_an_end_at_every_stage_frees_both_executors(apart, stage, end):
    if stage != "decoding":
        (apart.decode if stage == "reserving" else apart.prefill).gate.clear()
    # The gateway's end comes a twentieth before the call's own, which is the more the longer it is.
    call = apart.inference.Generate(request(tokens=4000, n=2), timeout=2.0 if end == "deadline" else None)
    if stage == "decoding":
        await call.read()
        apart.decode.gate.clear()
    else:
        await (apart.decode if stage == "reserving" else apart.prefill).started.wait()
    if end == "cancel":
        call.cancel()
    if end == "deadline" and stage != "reserving":  # a choice has told something
        assert inference_pb2.FINISH_REASON_DEADLINE in {m.finish.reason for m in await read(call)}
    else:
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await read(call)
    for executor in apart.executors:
        executor.gate.set()
    await apart.rest()


async def test_the_tokenizer_may_restart_between_the_halves(apart):
    apart.prefill.gate.clear()
    call = apart.inference.Generate(request())
    await apart.prefill.started.wait()
    await apart.tokenizer.kill()
    await apart.tokenizer.start()
    apart.prefill.gate.set()
    await answered(apart, call)


async def test_one_trace_goes_through_both_executors(apart):
    exporter = InMemorySpanExporter()
    tracing.configure("gateway", exporter=exporter)
    try:
        await answered(apart, apart.inference.Generate(request()))
        apart.prefill.fail_handoffs = executor_pb2.HANDOFF_FAILURE_BACKEND
        await answered(apart, apart.inference.Generate(request()))
        spans = exporter.get_finished_spans()
    finally:
        tracing.shutdown()
    whole = {s.context.span_id for s in spans if s.name == "request"}
    starts = [*apart.decode.all_started, *apart.prefill.all_started]
    assert {int(start.traceparent.split("-")[2], 16) for start in starts} == whole
    parts = {s.name: s for s in spans if s.parent is not None and s.parent.span_id in whole}
    assert {"place", "reserve", "prefill", "transfer", "decode", "fallback"} <= set(parts)
    assert dict(parts["transfer"].attributes) == {"kv_bytes": 4096, "transport": "grpc"}
    assert dict(parts["fallback"].attributes) == {"fallback": "recompute_on_decode", "reason": "backend"}
