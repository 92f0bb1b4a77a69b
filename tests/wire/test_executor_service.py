"""The executor over real gRPC, with the fake backend on the built-in checkpoint's shape."""

import asyncio
import contextlib
import threading
import urllib.request
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from structlog.testing import capture_logs

from penstock.backends.fake import next_token
from penstock.common import tracing
from penstock.common.channel import connect
from penstock.common.prefix import WIRE_BYTES, block_hashes, wire_form
from penstock.common.server import GrpcServer
from penstock.common.service import StartError
from penstock.executor import tuning
from penstock.executor.config import ExecutorConfig
from penstock.executor.engine import EngineDead
from penstock.executor.server import ExecutorServer
from penstock.internal.v1 import executor_pb2 as pb
from penstock.internal.v1 import executor_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc


@asynccontextmanager
async def serving(**settings):
    server = ExecutorServer(ExecutorConfig(**{"model": "builtin", "backend": "fake", "listen": "127.0.0.1:0"} | settings))
    try:
        address = (await server.start())["grpc"]
        async with connect(address) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            described = (await stub.GetExecutor(pb.GetExecutorRequest())).description
            yield server, channel, stub, described
    finally:
        await server.close()


def start(described, sequence_id=1, prompt=(1, 2, 3), max_tokens=5, **fields):
    return pb.StartSequence(
        sequence_id=sequence_id, prompt_ids=prompt, max_tokens=max_tokens, executor_id=described.executor_id, **fields
    )


def expected(described, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, described.vocabulary_size))
    return ids[len(prompt) :]


async def responses_of(call):
    while (response := await call.read()) is not grpc.aio.EOF:
        yield response


async def collect(call, sequences):
    """The responses until all of `sequences` have finished: tokens and finish by sequence."""
    tokens, finished = {i: [] for i in sequences}, {}
    async for response in responses_of(call):
        for sequence_id, token, position in zip(response.sequence_ids, response.token_ids, response.positions, strict=True):
            assert position == len(tokens[sequence_id])
            tokens[sequence_id].append(token)
        finished |= {f.sequence_id: f for f in response.finished}
        if finished.keys() >= set(sequences):
            break
    return tokens, finished


async def free_again(stub):
    """Wait until no block is used."""
    state = await stub.GetExecutor(pb.GetExecutorRequest())
    while state.kv_blocks_used or state.load.running:
        await asyncio.sleep(0.01)  # asking has its price for who is asked
        state = await stub.GetExecutor(pb.GetExecutorRequest())
    return state


async def test_sequences_of_one_gateway_stream_their_tokens():
    async with serving() as (_, _, stub, described):
        call = stub.Run()
        prompts = {1: [1, 2, 3], 2: list(range(100)), 3: [7] * 33}
        await call.write(pb.RunRequest(start=[start(described, i, p, 20) for i, p in prompts.items()]))
        tokens, finished = await collect(call, prompts)
        assert tokens == {i: expected(described, p, 20) for i, p in prompts.items()}
        assert {f.reason for f in finished.values()} == {pb.SEQUENCE_FINISH_LENGTH}
        state = await free_again(stub)
        assert state.kv_blocks_cached + state.kv_blocks_free == described.kv_blocks


async def test_a_replayed_sequence_goes_on_where_it_was():
    async with serving() as (_, _, stub, described):
        whole = expected(described, [5, 6], 12)
        call = stub.Run()
        await call.write(pb.RunRequest(start=[start(described, 9, [5, 6], 12, replayed_ids=whole[:7])]))
        told = []
        async for response in responses_of(call):
            told += zip(response.positions, response.token_ids, strict=True)
            if response.finished:
                break
        assert told == list(enumerate(whole))[7:]


async def test_log_probabilities_of_prompt_and_output_are_told():
    async with serving() as (_, _, stub, described):
        call = stub.Run()
        await call.write(pb.RunRequest(start=[start(described, 1, range(40), 2, logprobs=3, prompt_logprobs=1)]))
        responses = []
        async for response in responses_of(call):
            responses.append(response)
            if response.finished:
                break
        of_output = [told for response in responses for told in response.logprobs]
        assert [(told.position, told.rank, len(told.top_ids)) for told in of_output] == [(0, 1, 3), (1, 1, 3)]
        (of_prompt,) = [told for response in responses for told in response.prompt_logprobs]
        assert [told.position for told in of_prompt.tokens] == list(range(1, 40))


async def test_another_executors_sequence_is_refused_and_others_go_on():
    async with serving() as (_, _, stub, described):
        call = stub.Run()
        wrong = start(described, 1)
        wrong.executor_id = "another"
        await call.write(pb.RunRequest(start=[wrong, start(described, 2)]))
        tokens, finished = await collect(call, [1, 2])
        assert finished[1].reason == pb.SEQUENCE_FINISH_REFUSED
        assert "another" in finished[1].message
        assert len(tokens[2]) == 5


async def test_a_sequence_that_can_never_fit_is_refused():
    async with serving() as (_, _, stub, described):
        call = stub.Run()
        await call.write(pb.RunRequest(start=[start(described, 1, [1], described.context_length)]))
        _, finished = await collect(call, [1])
        assert finished[1].reason == pb.SEQUENCE_FINISH_REFUSED
        assert str(described.context_length) in finished[1].message


async def test_an_aborted_sequence_frees_its_blocks_and_is_heard_of_no_more():
    async with serving() as (_, _, stub, described):
        call = stub.Run()
        await call.write(pb.RunRequest(start=[start(described, 1, [1], described.context_length - 1)]))
        await call.read()
        await call.write(pb.RunRequest(aborted=[1]))
        await free_again(stub)
        await call.write(pb.RunRequest(start=[start(described, 2)]))
        heard = set()
        async for response in responses_of(call):
            heard |= {f.sequence_id for f in response.finished}
            if 2 in heard:
                break
        assert heard == {2}


@pytest.mark.parametrize("ending", ["half-close", "cancel"])
async def test_the_end_of_a_stream_ends_its_sequences(ending):
    async with serving() as (_, _, stub, described):
        call, other = stub.Run(), stub.Run()
        await call.write(pb.RunRequest(start=[start(described, i, [i], described.context_length - 1) for i in range(8)]))
        await call.read()
        if ending == "cancel":
            call.cancel()
        else:
            await call.done_writing()
        await other.write(pb.RunRequest(start=[start(described)]))
        _, finished = await collect(other, [1])
        assert finished[1].reason == pb.SEQUENCE_FINISH_LENGTH
        await free_again(stub)


async def test_a_gateway_that_does_not_read_loses_its_stream_alone(monkeypatch):
    monkeypatch.setattr("penstock.executor.servicer._MOST_WAITING", 16)
    async with serving() as (server, _, stub, described):
        slow, quick = stub.Run(), stub.Run()
        # More than HTTP/2's window holds, in answers that are not read until the executor has given them up.
        hungry = [start(described, i, [i], described.context_length - 1, logprobs=20) for i in range(24)]
        await slow.write(pb.RunRequest(start=hungry))
        while not server._loaded.engine.meter.generated:
            await stub.GetExecutor(pb.GetExecutorRequest())
        await free_again(stub)
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for response in responses_of(slow):
                assert not response.finished, "it was to be cut off, not to be waited for"
        assert await slow.code() is not grpc.StatusCode.OK
        await quick.write(pb.RunRequest(start=[start(described)]))
        tokens, _ = await collect(quick, [1])
        assert tokens[1] == expected(described, [1, 2, 3], 5)


async def test_a_draining_executor_finishes_what_runs_and_refuses_what_comes():
    async with serving() as (server, channel, stub, described):
        health = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service="penstock.internal.v1.ExecutorService")
        assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.SERVING
        call = stub.Run()
        await call.write(pb.RunRequest(start=[start(described, 1, [1], 2000)]))
        first = await call.read()
        draining = asyncio.create_task(server.drain())
        await until_status(channel, health_pb2.HealthCheckResponse.NOT_SERVING)
        await call.write(pb.RunRequest(start=[start(described, 2)]))
        tokens, finished = list(first.token_ids), {}
        async for response in responses_of(call):
            tokens += response.token_ids
            finished |= {f.sequence_id: f.reason for f in response.finished}
            if len(finished) == 2:
                break
        await draining
        assert finished == {1: pb.SEQUENCE_FINISH_LENGTH, 2: pb.SEQUENCE_FINISH_REFUSED}
        assert tokens == expected(described, [1], 2000)


class Raising:
    """A backend's model that raises at each step while it is told to."""

    def __init__(self, model):
        self._model, self._step = model, model.step
        self.raising = 0
        model.step = self.step

    def step(self, batch):
        if self.raising:
            self.raising -= 1
            raise RuntimeError("device lost")
        return self._step(batch)


async def test_a_step_that_raises_costs_its_sequences_and_no_more():
    async with serving() as (server, _, stub, described):
        Raising(server._loaded.model).raising = 1
        call = stub.Run()
        await call.write(pb.RunRequest(start=[start(described, 1)]))
        _, finished = await collect(call, [1])
        assert finished[1].reason == pb.SEQUENCE_FINISH_FAILED
        await call.write(pb.RunRequest(start=[start(described, 2)]))
        tokens, _ = await collect(call, [2])
        assert tokens[2] == expected(described, [1, 2, 3], 5)


async def test_a_backend_that_raises_again_ends_the_service():
    async with serving() as (server, channel, stub, described):
        Raising(server._loaded.model).raising = 2
        waiting = asyncio.create_task(server.wait())
        call = stub.Run()
        for i in (1, 2):
            await call.write(pb.RunRequest(start=[start(described, i)]))
            _, finished = await collect(call, [i])
            assert finished[i].reason == pb.SEQUENCE_FINISH_FAILED
        with pytest.raises(EngineDead, match="device lost"):
            await waiting
        await until_status(channel, health_pb2.HealthCheckResponse.NOT_SERVING)


async def until_status(channel, status):
    health = health_pb2_grpc.HealthStub(channel)
    async for told in health.Watch(health_pb2.HealthCheckRequest(service="")):
        if told.status == status:
            return


async def test_health_tells_a_step_that_does_not_return_and_its_return():
    async with serving(stall_seconds=0.1, stall_seconds_per_prompt_token=0) as (server, channel, stub, described):
        release = threading.Event()
        model = server._loaded.model
        step = model.step

        def stuck(batch):
            release.wait()
            return step(batch)

        model.step = stuck
        try:
            call = stub.Run()
            await call.write(pb.RunRequest(start=[start(described)]))
            await until_status(channel, health_pb2.HealthCheckResponse.NOT_SERVING)
        finally:
            release.set()
        await until_status(channel, health_pb2.HealthCheckResponse.SERVING)
        tokens, _ = await collect(call, [1])
        assert tokens[1] == expected(described, [1, 2, 3], 5)


class Pool(scheduler_pb2_grpc.SchedulerServiceServicer):
    """A scheduler that only listens."""

    def __init__(self, lease_ms=5000):
        self.heard = asyncio.Queue()
        self.lease_ms = lease_ms

    async def Register(self, request_iterator, context):  # noqa: N802 - gRPC's name
        yield scheduler_pb2.RegisterResponse(lease_ms=self.lease_ms)
        async for request in request_iterator:
            self.heard.put_nowait(request)

    async def Place(self, request_iterator, context):  # noqa: N802 - gRPC's name
        raise NotImplementedError

    async def ListExecutors(self, request, context):  # noqa: N802 - gRPC's name
        raise NotImplementedError

    async def hear(self, wanted):
        while not wanted(request := await self.heard.get()):
            pass
        return request


@asynccontextmanager
async def pooling(pool, address="127.0.0.1:0"):
    server = GrpcServer()
    server.add(scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server, pool, "penstock.internal.v1.SchedulerService")
    bound = server.listen(address)
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(0)


def unpacked(hashes):
    return {hashes[i : i + WIRE_BYTES] for i in range(0, len(hashes), WIRE_BYTES)}


async def test_an_executor_tells_for_whom_it_waits_and_that_they_are_there():
    async with pooling(Pool()) as address:
        pass
    with capture_logs() as logs:

        def lines(event):
            return [(line["waits_for"], line["address"], line["log_level"]) for line in logs if line["event"].startswith(event)]

        async def told(event):
            while not lines(event):  # noqa: ASYNC110 - a log tells nobody that it has grown
                await asyncio.sleep(0.002)
            return lines(event)

        async with serving(scheduler=address):
            assert await told("waits") == [("scheduler", address, "warning")]
            async with pooling(Pool(), address):
                assert await told("reached") == [("scheduler", address, "info")]


async def test_the_scheduler_is_told_of_prefixes_and_again_when_it_comes_back():
    async with AsyncExitStack() as stack:
        pool = Pool()
        first_life = await stack.enter_async_context(AsyncExitStack())
        address = await first_life.enter_async_context(pooling(pool))
        _, _, stub, described = await stack.enter_async_context(serving(scheduler=address))
        first = await pool.hear(lambda _: True)
        assert first.description == described
        assert (first.kv_events.sequence, first.kv_events.cleared, first.kv_events.stored) == (1, True, b"")

        prompt, salt = list(range(48)), b"s" * 16
        hashes = unpacked(wire_form(block_hashes(prompt, described.kv_block_size, salt)))
        call = stub.Run()
        await call.write(pb.RunRequest(start=[start(described, 1, prompt, 1, cache_salt=salt)]))
        await collect(call, [1])
        change = await pool.hear(lambda r: r.kv_events.stored)
        assert change.kv_events.sequence == 2
        assert unpacked(change.kv_events.stored) == hashes

        await first_life.aclose()
        again = Pool()
        await stack.enter_async_context(pooling(again, address))
        snapshot = await again.hear(lambda r: r.HasField("description"))
        assert (snapshot.kv_events.sequence, snapshot.kv_events.cleared) == (1, True)
        assert unpacked(snapshot.kv_events.stored) == hashes


async def test_the_scheduler_hears_what_the_executor_has_measured_and_hears_the_same_of_the_next_start(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_DISTURBED", 1000)  # steps of the fake backend are too short to be judged on a busy machine
    heard = []
    for _ in range(2):
        pool = Pool()
        async with pooling(pool) as address, serving(scheduler=address, cache_folder=str(tmp_path)):
            heard.append((await pool.hear(lambda r: r.HasField("description"))).description)
    calibration = heard[0].calibration
    assert heard[1].calibration == calibration
    assert heard[1].prefill_chunk == heard[0].prefill_chunk > 0
    assert calibration.prefill.sizes[0] == 16
    assert calibration.decode.sizes[0] == 1
    assert all(seconds > 0 for seconds in (*calibration.prefill.seconds, *calibration.decode.seconds))


async def test_an_idle_executor_says_that_it_lives_as_often_as_the_schedulers_lease_wants():
    hasty, patient = Pool(lease_ms=150), Pool(lease_ms=60_000)
    async with (
        pooling(hasty) as one,
        pooling(patient) as other,
        serving(scheduler=one),
        serving(scheduler=other),
    ):
        await patient.hear(lambda r: r.HasField("description"))
        for _ in range(20):
            await hasty.hear(lambda _: True)
    assert patient.heard.qsize() < 10


async def test_the_scheduler_hears_at_once_that_an_executor_drains():
    pool = Pool()
    async with pooling(pool) as address, serving(scheduler=address) as (server, _, _, _):
        await pool.hear(lambda r: r.HasField("description"))
        await server.drain()
        await pool.hear(lambda r: r.draining)


async def test_the_scheduler_hears_that_the_engine_has_stopped_and_that_it_is_back():
    pool, release = Pool(), threading.Event()
    async with pooling(pool) as address, serving(scheduler=address, stall_seconds=0.1) as (server, _, stub, described):
        await pool.hear(lambda r: r.HasField("description"))
        plan = server._loaded.engine.planner.plan
        server._loaded.engine.planner.plan = lambda: release.wait() and plan()
        try:
            call = stub.Run()
            await call.write(pb.RunRequest(start=[start(described)]))
            await pool.hear(lambda r: r.stalled)
        finally:
            release.set()
        assert (await pool.hear(lambda r: r.HasField("description"))).description == described


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"max_batch_tokens": 64}, "max_batch_tokens"),
        ({"kv_cache_gib": -1}, "kv_cache_gib"),
        ({"kv_cache_share": 1.5}, "kv_cache_share"),
        ({"grace_seconds": float("nan")}, "grace_seconds: must be a number of at least 0, not nan"),
        ({"grace_seconds": -1}, "grace_seconds: must be a number of at least 0, not -1"),
        ({"handoff_push_mib": 64}, "handoff_push_mib: .* at most 32, and is 64"),
        ({"handoff_push_mib": float("nan")}, "handoff_push_mib: .*, and is nan"),
        ({"handoff_window_mib": 2}, "handoff_window_mib: .* at least handoff_push_mib, 16, and is 2"),
        ({"handoff_window_mib": float("inf")}, "handoff_window_mib: .*, and is inf"),
        ({"dtype": "int4"}, "int4"),
        ({"listen": "203.0.113.1:1"}, "listen"),
    ],
)
async def test_what_can_not_start_says_why(settings, told):
    with pytest.raises(StartError, match=told):
        async with serving(**settings):
            pass


async def test_metrics_tell_blocks_tokens_and_prefix_hits():
    async with serving(metrics="127.0.0.1:0") as (server, _, stub, described):
        call = stub.Run()
        for i in (1, 2):
            await call.write(pb.RunRequest(start=[start(described, i, range(64), 4)]))
            await collect(call, [i])
        text = (await asyncio.to_thread(urllib.request.urlopen, f"http://{server._endpoint.address}/metrics")).read().decode()
        told = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        label = 'model_name="builtin"'
        assert float(told[f"penstock_generation_tokens_total{{{label}}}"]) == 8
        assert float(told[f"penstock_prompt_tokens_total{{{label}}}"]) == 128
        assert float(told[f"penstock_prefix_cache_hits_total{{{label}}}"]) == 48
        assert float(told[f'penstock_sequences_finished_total{{finished_reason="length",{label}}}']) == 2
        assert float(told[f"penstock_num_requests_running{{{label}}}"]) == 0
        assert float(told[f"penstock_step_seconds_count{{{label}}}"]) == 8


async def test_spans_tell_a_sequences_stages_under_the_gateways():
    exporter = InMemorySpanExporter()
    try:
        async with serving() as (_, _, stub, described):
            tracing.configure("test", exporter=exporter)
            with tracing.start("request", "") as above:
                call = stub.Run()
                await call.write(pb.RunRequest(start=[start(described, traceparent=above.traceparent)]))
                await collect(call, [1])
                await call.done_writing()
                await call.read()
        spans = {span.name: span for span in exporter.get_finished_spans()}
        assert spans.keys() == {"request", "wait", "prefill", "decode"}
        assert {spans[name].parent.span_id for name in ("wait", "prefill", "decode")} == {spans["request"].context.span_id}
        assert spans["wait"].end_time == spans["prefill"].start_time
    finally:
        tracing.shutdown()
