"""What clients see when services die, refuse or stall, and that nothing is left behind."""

import asyncio
import gc
import json
import socket

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from structlog.testing import capture_logs

from penstock.common.errors import error_from_status
from penstock.gateway.ports import Text
from penstock.v1 import inference_pb2, inference_pb2_grpc


def request(tokens=60, **fields):
    fields.setdefault("prompt", inference_pb2.Prompt(text="Tell me"))
    return inference_pb2.GenerateRequest(
        model="story",
        stopping=inference_pb2.Stopping(max_tokens=tokens),
        reporting=inference_pb2.Reporting(token_ids=True),
        sampling=inference_pb2.Sampling(seed=5),
        **fields,
    )


def story(suite, tokens=60):
    return suite.story.encode()[:tokens].decode(errors="ignore")


def text_of(answers, index=0):
    return "".join(m.text for m in answers if m.index == index)


async def told(call):
    answers = []
    while (answer := await call.read()) is not grpc.aio.EOF:
        answers.append(answer)
    return answers


async def test_an_executor_that_dies_is_a_pause_and_no_more(suite):
    suite.executors[0].die_after = 4
    answers = await told(suite.inference.Generate(request(n=2)))
    for index in (0, 1):
        assert text_of(answers, index) == story(suite)
        assert bytes(i for m in answers if m.index == index for i in m.token_ids) == suite.story.encode()[:60]
    closing = answers[-1].closing
    assert [p.executor_id for p in closing.placements] == ["executor-0", "executor-1"]
    assert closing.replacements == 1
    replayed = suite.executors[1].all_started[0]
    assert bytes(replayed.replayed_ids) == suite.story.encode()[: len(replayed.replayed_ids)]
    assert replayed.replayed_ids
    assert replayed.sampling.seed == 5
    assert suite.scheduler.placings[1].replacing
    assert list(suite.scheduler.placings[1].avoid_executor_ids) == ["executor-0"]
    await suite.rest()


def connections(executor):
    """How many there are to it; gateway and executor are this process."""
    port = int(executor.address.rpartition(":")[2])
    found = psutil.Process().net_connections("tcp")
    return sum(bool(c.raddr) and c.raddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in found)


async def test_the_connection_to_an_executor_that_is_left_ends_and_waits_for_no_collection(suite):
    first = suite.executors[0]
    await told(suite.inference.Generate(request()))
    assert connections(first) == 1
    gc.disable()
    try:
        await suite.scheduler.tell_lost(first)
        await suite.eventually(lambda: connections(first) == 0)
    finally:
        gc.enable()


@pytest.mark.parametrize("stage", ["prefilling", "decoding"])
async def test_an_executor_that_stalls_is_left_when_the_scheduler_tells_and_heard_no_more(suite, stage):
    stalled, other = suite.executors
    if stage == "prefilling":
        stalled.gate.clear()
    else:
        stalled.hold_after = 1
    call = suite.inference.Generate(request(n=2))
    await stalled.started.wait()
    first = [] if stage == "prefilling" else [await call.read()]
    await suite.scheduler.tell_lost(stalled)
    answers = [*first, *await told(call)]
    for index in (0, 1):
        assert text_of(answers, index) == story(suite)
        assert bytes(i for m in answers if m.index == index for i in m.token_ids) == suite.story.encode()[:60]
    assert answers[-1].closing.replacements == 1
    assert list(suite.scheduler.placings[1].avoid_executor_ids) == [stalled.name]
    assert len(other.all_started) == 2
    await suite.rest()  # while it stalls still: its stream was ended
    stalled.gate.set()
    assert text_of(await told(suite.inference.Generate(request()))) == story(suite)
    assert len(stalled.all_started) == 3, "it serves again"
    await suite.rest()


async def test_a_choice_that_is_complete_takes_no_place_again(suite):
    """The first choice's stop text is found while the second one goes on."""
    asked = request(n=2, tokens=4000)
    asked.stopping.stop.append("no such text")
    call = suite.inference.Generate(asked)
    await call.read()
    suite.executors[0].gate.clear()
    (live,) = suite.gateway.admission.requests.values()
    live.text(live.choices[0], Text("", live.choices[0].told_bytes, live.choices[0].told_tokens, stop_index=0, last=True))
    await suite.executors[0].kill()
    await suite.eventually(lambda: len(suite.scheduler.placings) == 2)
    assert [p.choices for p in suite.scheduler.placings] == [2, 1]
    call.cancel()
    await suite.rest()


async def test_a_refused_sequence_is_placed_again(suite):
    suite.executors[0].refuse = 1
    answers = await told(suite.inference.Generate(request()))
    assert text_of(answers) == story(suite)
    assert answers[-1].closing.replacements == 1
    await suite.rest()


async def test_a_request_that_every_executor_refuses_fails_as_unavailable(suite):
    for executor in suite.executors:
        executor.refuse = 100
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await told(suite.inference.Generate(request()))
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert len(suite.scheduler.placings) == 5
    await suite.rest()


async def test_a_tokenizer_that_dies_loses_and_doubles_no_text(suite):
    suite.executors[0].hold_after = 1
    call = suite.inference.Generate(request())
    first = await call.read()
    await suite.tokenizer.kill()
    await suite.tokenizer.start()
    suite.executors[0].gate.set()
    rest = await told(call)
    assert text_of([first, *rest]) == story(suite)
    assert bytes(i for m in [first, *rest] for i in m.token_ids) == suite.story.encode()[:60]
    await suite.rest()


async def test_a_tokenizer_that_comes_back_without_the_model_is_an_error_and_no_end(suite):
    """An answer that was cut off must not look like one that is complete."""
    suite.executors[0].hold_after = 1
    call = suite.inference.Generate(request())
    await call.read()
    (live,) = suite.gateway.admission.requests.values()
    live.text(live.choices[0], Text("", live.choices[0].told_bytes, live.choices[0].told_tokens, last=True))
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await told(call)
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    suite.executors[0].gate.set()
    await suite.rest()


async def test_a_scheduler_that_dies_is_told_of_leases_and_of_the_queue(suite):
    suite.executors[0].hold_after = 1
    running = suite.inference.Generate(request(n=2))
    first = await running.read()
    suite.scheduler.gate.clear()
    suite.scheduler.placed.clear()
    queued = asyncio.create_task(told(suite.inference.Generate(request())))
    await suite.scheduler.placed.wait()
    await suite.scheduler.kill()
    suite.scheduler.placed.clear()
    await suite.scheduler.start()
    await suite.scheduler.announced_any.wait()
    await suite.scheduler.placed.wait()
    assert [(lease.executor_id, lease.choices) for lease in suite.scheduler.announced] == [("executor-0", 2)]
    suite.scheduler.gate.set()
    suite.executors[0].gate.set()
    answers = [first, *await told(running)]
    assert text_of(answers) == story(suite)
    assert answers[-1].closing.replacements == 0
    assert text_of(await queued) == story(suite)
    await suite.rest()


STAGES = ["encoding", "queued", "prefilling", "decoding"]


async def hold(suite, stage):
    """Have requests stop at a stage; a coroutine that waits until one is there."""
    if stage == "encoding":
        suite.tokenizer.encode_gate.clear()
        return suite.tokenizer.encoding.wait
    if stage == "queued":
        suite.scheduler.gate.clear()
        return suite.scheduler.placed.wait
    if stage == "prefilling":
        suite.executors[0].gate.clear()
        return suite.executors[0].started.wait

    async def decoding():
        await suite.eventually(lambda: any(r.record.first_token_at for r in suite.gateway.admission.requests.values()))

    return decoding


@pytest.mark.parametrize("stage", STAGES)
async def test_cancel_over_grpc_gives_everything_back(suite, stage):
    reached = await hold(suite, stage)
    call = suite.inference.Generate(request(tokens=4000))
    await reached()
    call.cancel()
    await suite.rest()


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", STAGES)
async def test_a_client_that_leaves_over_http_gives_everything_back(suite, stage, stream):
    reached = await hold(suite, stage)
    async with httpx.AsyncClient(base_url=suite.http) as client:
        body = {"model": "story", "prompt": "Tell me", "max_tokens": 4000, "stream": stream}
        post = asyncio.create_task(client.post("/v1/completions", json=body))
        await reached()
        post.cancel()
        await asyncio.wait((post,))
    await suite.rest()


@pytest.mark.parametrize("stage", STAGES[:3])
async def test_a_deadline_before_the_first_token_is_an_error(suite, stage):
    await hold(suite, stage)
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await told(suite.inference.Generate(request(), timeout=0.3))
    assert failure.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await suite.rest()


@pytest.mark.parametrize("stage", STAGES[:3])
async def test_the_doors_own_deadline_is_an_error_over_http(suite_with, stage):
    async with suite_with(default_deadline_seconds=0.3) as suite:
        await hold(suite, stage)
        async with httpx.AsyncClient(base_url=suite.http) as client:
            reply = await client.post("/v1/completions", json={"model": "story", "prompt": "Tell me"})
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "deadline_exceeded"
        await suite.rest()


@pytest.mark.parametrize(("seconds", "given"), [(0.5, None), (60, 0.5)])
async def test_a_deadline_behind_the_first_token_is_a_finish_reason(suite_with, seconds, given):
    """The door's own, and the call's: the client hears of it before its own timer ends the call."""
    async with suite_with(default_deadline_seconds=seconds) as suite:
        call = suite.inference.Generate(request(tokens=4000), timeout=given)
        first = await call.read()
        suite.executors[0].gate.clear()
        answers = [first, *await told(call)]
        assert answers[-2].finish.reason == inference_pb2.FINISH_REASON_DEADLINE
        assert story(suite, 4000).startswith(text_of(answers))
        assert answers[-1].closing.usage.completion_tokens == sum(len(m.token_ids) for m in answers)
        await suite.rest()


@pytest.mark.parametrize(
    ("reason", "code", "status"),
    [
        (1, grpc.StatusCode.RESOURCE_EXHAUSTED, 429),
        (2, grpc.StatusCode.DEADLINE_EXCEEDED, 504),
        (3, grpc.StatusCode.NOT_FOUND, 404),
        (4, grpc.StatusCode.INVALID_ARGUMENT, 400),
        (5, grpc.StatusCode.UNAVAILABLE, 503),
    ],
)
async def test_the_schedulers_refusals_have_a_status_of_their_own(suite, reason, code, status):
    suite.scheduler.refusal = {"reason": reason, "field": "sampling.min_p", "message": "no", "retry_after_ms": 2500}
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await told(suite.inference.Generate(request()))
    assert failure.value.code() is code
    async with httpx.AsyncClient(base_url=suite.http) as client:
        for stream in (False, True):
            reply = await client.post("/v1/completions", json={"model": "story", "prompt": "x", "stream": stream})
            assert reply.status_code == status
            assert ("retry-after" in reply.headers) == (status in {429, 503})
    await suite.rest()


async def test_a_drain_lets_running_work_finish_and_refuses_new(suite):
    suite.executors[0].hold_after = 1
    call = suite.inference.Generate(request())
    first = await call.read()
    drained = asyncio.create_task(suite.gateway.drain())
    await suite.eventually(lambda: suite.gateway.not_ready() == "draining")
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await told(suite.inference.Generate(request()))
    assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
    assert error_from_status(failure.value.code(), rpc_status.from_call(failure.value)).retry_after == 1.0
    suite.executors[0].gate.set()
    assert text_of([first, *await told(call)]) == story(suite)
    await drained
    await suite.rest()


async def test_a_drain_ends_what_does_not_finish_in_its_grace(suite_with):
    async with suite_with(grace_seconds=0.1) as suite:
        call = suite.inference.Generate(request(tokens=4000))
        await call.read()
        suite.executors[0].gate.clear()
        suite.scheduler.gate.clear()
        untold = suite.inference.Generate(request())
        await suite.eventually(lambda: len(suite.scheduler.placings) == 2)
        drained = asyncio.create_task(suite.gateway.drain())
        answers = await told(call)
        assert answers[-2].finish.reason == inference_pb2.FINISH_REASON_CANCELLED
        assert answers[-1].closing.usage.prompt_tokens == 7
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await told(untold)
        assert failure.value.code() is grpc.StatusCode.UNAVAILABLE
        await drained
        await suite.rest()


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_no_executor_can_go_on_with_ends_as_an_error(suite, stream):
    gate = suite.executors[0].gate
    async with httpx.AsyncClient(base_url=suite.http) as client:
        body = {"model": "story", "prompt": "x", "max_tokens": 4000, "stream": stream}
        over_http = asyncio.create_task(client.post("/v1/completions", json=body))
        call = suite.inference.Generate(request(tokens=4000))
        first = await call.read()
        await suite.eventually(lambda: sum(r.told_anything for r in suite.gateway.admission.requests.values()) == 2)
        gate.clear()
        for executor in suite.executors:
            executor.refuse = 100
        await suite.executors[0].kill()
        answers = [first, *await told(call)]
        assert answers[-2].finish.reason == inference_pb2.FINISH_REASON_ERROR
        assert story(suite, 4000).startswith(text_of(answers))
        reply = await over_http
    if stream:
        assert '"finish_reason":"error"' in reply.text
        assert '"code":"unavailable"' in reply.text
    else:
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
    await suite.rest()


async def test_a_reader_that_takes_nothing_is_cut_off(suite_with):
    async with suite_with(slow_reader_seconds=0.2) as suite:
        call = suite.inference.Generate(request(tokens=4000))
        await call.read()
        (live,) = suite.gateway.admission._calls
        live.queue.take = asyncio.Event().wait  # from now on the door is stuck, as in a write to a client that reads nothing
        await suite.rest()
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await told(call)
        assert await call.code() is grpc.StatusCode.CANCELLED


async def test_ready_and_health_follow_the_other_services(suite):
    async with httpx.AsyncClient(base_url=suite.http) as client:
        assert (await client.get("/ready")).status_code == (await client.get("/health")).status_code == 200
        await suite.tokenizer.kill()
        await suite.eventually(lambda: suite.gateway.not_ready() == "no tokenizer")
        assert (await client.get("/ready")).status_code == 503
        watch = health_pb2_grpc.HealthStub(suite.channel)
        for name in ("", "penstock.v1.Inference"):
            status = (await watch.Check(health_pb2.HealthCheckRequest(service=name))).status
            assert status == health_pb2.HealthCheckResponse.NOT_SERVING
        told = await client.get("/health")
        assert (told.status_code, told.json()["reason"]) == (503, "no tokenizer")
        await suite.tokenizer.start()
        await suite.eventually(lambda: not suite.gateway.not_ready())
        await suite.scheduler.kill()
        await suite.eventually(lambda: suite.gateway.not_ready() == "no scheduler")
        suite.scheduler.executors = []
        await suite.scheduler.start()
        await suite.eventually(lambda: suite.gateway.not_ready() == "no executor")
        assert (await client.get("/health")).status_code == 503
        await suite.gateway.drain()
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/ready")).json()["reason"] == "draining"


def at_once(suite):
    """All of an answer comes together, so that nothing waits in the queue while the door writes."""
    for executor in suite.executors:
        executor.frame, executor.story = 3000, list(b"a" * 3001)


async def test_a_write_that_a_client_does_not_take_is_cut_off(suite_with):
    """The client sends its request and reads no byte of the answer, which is larger than what lies between the two."""
    async with suite_with(slow_reader_seconds=0.2, default_deadline_seconds=600.0) as suite:
        at_once(suite)
        suite.gateway._http._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # what it accepts has the same
        host, port = suite.http.removeprefix("http://").split(":")
        client, loop = socket.socket(), asyncio.get_running_loop()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.setblocking(False)
        await loop.sock_connect(client, (host, int(port)))
        body = {"prompt": "x", "max_tokens": 3000, "ignore_eos": True, "logprobs": 5, "stream": True}
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        await loop.sock_sendall(client, head + content)
        await suite.scheduler.placed.wait()
        await suite.rest()
        client.close()


async def test_a_last_message_that_a_client_does_not_take_is_cut_off_over_grpc(suite_with):
    async with suite_with(slow_reader_seconds=0.2, default_deadline_seconds=600.0) as suite:
        at_once(suite)
        window = [("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0)]
        async with grpc.aio.insecure_channel(suite.grpc, options=window) as channel:
            ask = request(tokens=3000, n=4)
            ask.stopping.ignore_eos = True
            ask.reporting.logprobs = 5
            call = inference_pb2_grpc.InferenceStub(channel).Generate(ask)
            await suite.scheduler.placed.wait()
            await suite.rest()
            call.cancel()


async def test_who_is_waited_for_and_where_is_told_once_and_so_is_that_they_are_back(suite):
    addresses = {"scheduler": suite.scheduler.address, "tokenizer": suite.tokenizer.address}
    with capture_logs() as logs:

        def told(event, level):
            return {
                line["waits_for"]: line["address"]
                for line in logs
                if line["event"].startswith(event) and line["log_level"] == level
            }

        await suite.scheduler.kill()
        await suite.tokenizer.kill()
        await suite.eventually(lambda: told("waits", "warning") == addresses)
        await suite.scheduler.start()
        await suite.tokenizer.start()
        await suite.eventually(lambda: told("reached", "info") == addresses)
    assert len([line for line in logs if "waits_for" in line]) == 4
