import asyncio
import contextlib
import hmac
import itertools
import secrets
from collections import deque

import grpc
import grpc.aio
import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from penstock.common import tracing
from penstock.common.channel import connect
from penstock.common.service import StartError
from penstock.internal.v1 import scheduler_pb2 as pb
from penstock.internal.v1 import scheduler_pb2_grpc as rpc
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.server import SchedulerServer

WAIT = 10.0


class Stream:
    """One side of a bidirectional stream: `send`, and answers as they come."""

    def __init__(self, method):
        self._frames = asyncio.Queue()
        self.call = method(self._requests())

    async def _requests(self):
        while (frame := await self._frames.get()) is not None:
            yield frame

    def send(self, frame):
        self._frames.put_nowait(frame)

    async def end(self):
        self._frames.put_nowait(None)
        while await self.read() is not grpc.aio.EOF:
            pass

    async def read(self):
        async with asyncio.timeout(WAIT):
            return await self.call.read()


class Gateway(Stream):
    def __init__(self, stub):
        super().__init__(stub.Place)
        self.granted, self.refused, self.catalogs, self.lost = deque(), deque(), deque(), deque()

    async def _until(self, queue):
        while not queue:
            response = await self.read()
            assert response is not grpc.aio.EOF
            self.granted += response.granted
            self.refused += response.refused
            self.lost += response.lost_executor_ids
            if response.HasField("catalog"):
                self.catalogs.append([e.executor_id for e in response.catalog.executors])
        return queue.popleft()

    async def grant(self):
        return await self._until(self.granted)

    async def refusal(self):
        return await self._until(self.refused)

    async def loss(self):
        return await self._until(self.lost)

    async def catalog(self, *ids):
        while await self._until(self.catalogs) != list(ids):
            pass

    def place(self, request_id, **fields):
        fields = {"model": "m", "prompt_tokens": 10, "max_tokens": 5} | fields
        self.send(pb.PlaceRequest(place=[pb.Placing(request_id=request_id, **fields)]))


def description(executor_id="e1", **fields):
    given = {
        "executor_id": executor_id,
        "address": f"127.0.0.1:{9000 + sum(executor_id.encode())}",
        "model": "m",
        "context_length": 1024,
        "kv_block_size": 16,
        "kv_blocks": 1000,
        "max_batch_size": 2,
        "fields": ["sampling.temperature"],
    }
    return pb.ExecutorDescription(**given | fields)


class Executor(Stream):
    def __init__(self, stub, executor_id="e1", **fields):
        super().__init__(stub.Register)
        self.secret = secrets.token_bytes(32)
        self.send(pb.RegisterRequest(description=description(executor_id, **fields), secret=self.secret))

    async def ready(self):
        response = await self.read()
        assert response.lease_ms > 0
        assert response.HasField("peers")
        self.first_peers = ids_of(response.peers)
        return self

    async def peers(self, *ids):
        """Until it is told of exactly these."""
        while (response := await self.read()).HasField("peers") is False or ids_of(response.peers) != list(ids):
            assert response is not grpc.aio.EOF
        return response.peers.peers

    async def confirm_role(self):
        """Take on the role that is told next."""
        while not (response := await self.read()).role:
            pass
        self.send(pb.RegisterRequest(role=response.role))
        return response.role


def ids_of(peers):
    return [peer.executor_id for peer in peers.peers]


@contextlib.asynccontextmanager
async def scheduler(listen="127.0.0.1:0", **config):
    server = SchedulerServer(SchedulerConfig(listen=listen, **{"settle_seconds": 0.0, "look_ahead": 0} | config))
    try:
        yield (await server.start())["grpc"], server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def stub_of(address):
    async with connect(address) as channel:
        yield rpc.SchedulerServiceStub(channel)


@contextlib.asynccontextmanager
async def served(**config):
    async with scheduler(**config) as (address, _), stub_of(address) as stub:
        yield stub


async def states(stub):
    listed = await stub.ListExecutors(pb.ListExecutorsRequest(), timeout=WAIT, wait_for_ready=True)
    return {e.description.executor_id: e for e in listed.executors}, listed.queued


async def eventually(check):
    async with asyncio.timeout(WAIT):
        while not await check():
            pass


async def test_request_is_granted_the_executor_with_its_address():
    async with served() as stub:
        await Executor(stub).ready()
        gateway = Gateway(stub)
        await gateway.catalog("e1")
        gateway.place(7)
        lease = await gateway.grant()
        assert (lease.request_id, lease.executor_id, lease.address) == (7, "e1", description().address)
        assert lease.tokens == 15
        assert lease.choices == 1


async def test_catalog_comes_first_and_follows_join_drain_and_leave():
    async with served() as stub:
        gateway = Gateway(stub)
        await gateway.catalog()
        first = await Executor(stub, "e1").ready()
        await gateway.catalog("e1")
        second = await Executor(stub, "e2").ready()
        await gateway.catalog("e1", "e2")
        second.send(pb.RegisterRequest(draining=True))
        await gateway.catalog("e1")
        gateway.place(1)
        assert (await gateway.grant()).executor_id == "e1"
        found, _ = await states(stub)
        assert found["e2"].draining
        await first.end()
        await gateway.catalog()


async def test_an_executors_secret_stays_with_the_scheduler_and_peers_get_what_is_made_for_each():
    async with served() as stub:
        first = await Executor(stub, "e1", model_fingerprint="v1").ready()
        second = await Executor(stub, "e2", model_fingerprint="v1").ready()
        third = await Executor(stub, "e3", model_fingerprint="v1").ready()
        told = {peer.executor_id: peer.proof for peer in await first.peers("e2", "e3")}
        assert told == {"e2": hmac.digest(second.secret, b"e1", "sha256"), "e3": hmac.digest(third.secret, b"e1", "sha256")}
        assert {peer.executor_id: peer.proof for peer in await second.peers("e1", "e3")} == {
            "e1": hmac.digest(first.secret, b"e2", "sha256"),
            "e3": hmac.digest(third.secret, b"e2", "sha256"),
        }
        said = [await stub.ListExecutors(pb.ListExecutorsRequest()), await Gateway(stub).read()]
        for hidden in (first.secret, second.secret, third.secret, *told.values()):
            assert not any(hidden in message.SerializeToString() for message in said)


async def test_a_scheduler_that_has_just_started_takes_no_peer_away_until_executors_have_had_time_to_register():
    async with served(settle_seconds=2.0) as stub:
        first = Executor(stub, model_fingerprint="v1")
        told = (await first.read()).peers
        assert (ids_of(told), told.more) == ([], True)
        second = Executor(stub, "e2", model_fingerprint="v1")
        assert (await second.read()).peers.more
        while told.more or ids_of(told) != ["e2"]:
            response = await first.read()
            assert response is not grpc.aio.EOF
            told = response.peers if response.HasField("peers") else told


async def test_peers_are_the_live_executors_of_the_same_version_of_a_model():
    async with served() as stub:
        first = await Executor(stub, "e1", model_fingerprint="v1").ready()
        assert first.first_peers == []
        for other in ({"model_fingerprint": "v2"}, {"model": "n", "model_fingerprint": "v1"}, {}):
            stranger = await Executor(stub, f"stranger-{other.get('model_fingerprint')}-{len(other)}", **other).ready()
            assert stranger.first_peers == []
        second = await Executor(stub, "e2", model_fingerprint="v1").ready()
        assert second.first_peers == ["e1"]
        (peer,) = await first.peers("e2")
        assert (peer.address, peer.model_fingerprint) == (description("e2").address, "v1")
        second.send(pb.RegisterRequest(draining=True))
        third = await Executor(stub, "e3", model_fingerprint="v1").ready()
        assert third.first_peers == ["e1", "e2"], "what drains hands over still"
        await first.peers("e2", "e3")
        second.send(pb.RegisterRequest(stalled=True))
        await first.peers("e3")
        await third.peers("e1")


async def test_role_is_taken_on_when_the_executor_confirms_it():
    async with served() as stub:
        executor = await Executor(stub).ready()
        gateway = Gateway(stub)
        await gateway.catalog("e1")
        gateway.place(1)
        await gateway.grant()

        async def role():
            return (await states(stub))[0]["e1"].description.role

        assert await role() == pb.ROLE_BOTH
        await stub.SetRole(pb.SetRoleRequest(executor_id="e1", role=pb.ROLE_PREFILL), timeout=WAIT)
        assert await role() == pb.ROLE_BOTH
        assert await executor.confirm_role() == pb.ROLE_PREFILL
        await gateway.catalog("e1")

        async def taken_on():
            return await role() == pb.ROLE_PREFILL

        await eventually(taken_on)
        assert (await states(stub))[0]["e1"].leases == 1


async def test_role_of_the_description_holds_from_the_start():
    async with served() as stub:
        await Executor(stub, role=pb.ROLE_DECODE).ready()
        assert (await states(stub))[0]["e1"].description.role == pb.ROLE_DECODE


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        ({"executor_id": "gone", "role": pb.ROLE_DECODE}, grpc.StatusCode.NOT_FOUND, "'gone'"),
        ({"executor_id": "e1"}, grpc.StatusCode.INVALID_ARGUMENT, "role: must be one of ROLE_BOTH, ROLE_PREFILL, ROLE_DECODE"),
        ({"executor_id": "e1", "role": 9}, grpc.StatusCode.INVALID_ARGUMENT, "role: must be one of"),
    ],
)
async def test_role_that_can_not_be_given_is_refused(asked, code, said):
    async with served() as stub:
        await Executor(stub).ready()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SetRole(pb.SetRoleRequest(**asked), timeout=WAIT)
        assert caught.value.code() is code
        assert said in caught.value.details()


async def test_executor_of_an_unknown_role_is_refused_by_field():
    async with served() as stub:
        with pytest.raises(grpc.aio.AioRpcError, match=r"description\.role") as caught:
            await Executor(stub, role=9).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_ended_gateway_frees_its_leases_and_its_queue():
    async with served() as stub:
        await Executor(stub).ready()
        dying, other = Gateway(stub), Gateway(stub)
        for request_id in range(5):
            dying.place(request_id)
        await dying.grant()
        await dying.grant()
        other.place(1)
        dying.call.cancel()
        assert (await other.grant()).request_id == 1

        async def only_one_lease():
            found, queued = await states(stub)
            return found["e1"].leases == 1 and not queued

        await eventually(only_one_lease)


async def test_released_lease_makes_room_and_released_queued_request_is_never_granted():
    async with served() as stub:
        await Executor(stub, max_batch_size=1).ready()
        gateway = Gateway(stub)
        gateway.place(1)
        await gateway.grant()
        gateway.place(2)
        gateway.place(3)
        gateway.send(pb.PlaceRequest(released=[2]))
        gateway.send(pb.PlaceRequest(released=[1]))
        assert (await gateway.grant()).request_id == 3


async def test_deadline_in_the_queue_is_told_without_anything_else_happening():
    async with served() as stub:
        await Executor(stub, max_batch_size=1).ready()
        gateway = Gateway(stub)
        gateway.place(1)
        await gateway.grant()
        gateway.place(2, deadline_ms=50)
        refusal = await gateway.refusal()
        assert (refusal.request_id, refusal.reason) == (2, pb.REFUSAL_REASON_DEADLINE)


@pytest.mark.parametrize(
    ("placing", "reason", "field", "said"),
    [
        ({"model": "other"}, pb.REFUSAL_REASON_UNKNOWN_MODEL, "", "there is m"),
        ({"fields": ["sampling.temperature", "sampling.min_p"]}, pb.REFUSAL_REASON_UNSUPPORTED, "sampling.min_p", "leave it out"),
        ({"prompt_tokens": 2000}, pb.REFUSAL_REASON_UNSUPPORTED, "prompt", "hold 1024"),
        ({"max_tokens": 1020}, pb.REFUSAL_REASON_UNSUPPORTED, "stopping.max_tokens", "1014 fit"),
    ],
)
async def test_what_can_never_run_is_refused_at_once_and_says_why(placing, reason, field, said):
    async with served(model_memory_seconds=0.0) as stub:
        await Executor(stub).ready()
        gateway = Gateway(stub)
        gateway.place(1, **placing)
        refusal = await gateway.refusal()
        assert (refusal.reason, refusal.field) == (reason, field)
        assert said in refusal.message


async def test_full_queue_refuses_with_a_time_to_come_back():
    async with served(max_queued_requests=1) as stub:
        await Executor(stub, max_batch_size=1).ready()
        gateway = Gateway(stub)
        for request_id in (1, 2, 3):
            gateway.place(request_id)
        refusal = await gateway.refusal()
        assert (refusal.request_id, refusal.reason) == (3, pb.REFUSAL_REASON_QUEUE_FULL)
        assert refusal.retry_after_ms > 0


async def test_cached_prefix_draws_a_request_and_lost_events_are_forgotten():
    hashes = bytes(range(64 * 8 // 8)) * 8
    async with served() as stub:
        first, second = await Executor(stub, "e1").ready(), await Executor(stub, "e2").ready()
        second.send(pb.RegisterRequest(kv_events=pb.KvEvents(sequence=1, stored=hashes[:64])))
        gateway = Gateway(stub)

        async def place(request_id):
            gateway.place(request_id, prompt_tokens=200, block_hashes=hashes[:64])
            lease = await gateway.grant()
            gateway.send(pb.PlaceRequest(released=[request_id]))
            return lease

        async def drawn():
            drawn.count += 1
            lease = await place(drawn.count)
            return lease.executor_id == "e2" and lease.expected_cached_tokens == 128

        drawn.count = 0
        await eventually(drawn)
        second.send(pb.RegisterRequest(kv_events=pb.KvEvents(sequence=3, removed=b"\1" * 8)))

        async def forgotten():
            drawn.count += 1
            return (await place(drawn.count)).expected_cached_tokens == 0

        await eventually(forgotten)
        assert first.call.done() is False


async def test_silent_executor_is_lost_and_its_stream_ends():
    async with served(lease_seconds=0.1) as stub:
        executor = await Executor(stub).ready()
        gateway = Gateway(stub)
        await gateway.catalog("e1")
        assert await gateway.loss() == "e1"
        assert await executor.read() is grpc.aio.EOF
        await gateway.catalog()
        assert (await states(stub))[0] == {}


async def test_executor_whose_engine_has_stopped_is_lost_at_once_and_may_come_back():
    async with served() as stub:
        executor = await Executor(stub).ready()
        gateway = Gateway(stub)
        await gateway.catalog("e1")
        executor.send(pb.RegisterRequest(stalled=True))
        assert await gateway.loss() == "e1"
        assert await executor.read() is grpc.aio.EOF
        await gateway.catalog()
        await Executor(stub).ready()
        gateway.place(1)
        assert (await gateway.grant()).executor_id == "e1"
        assert not gateway.lost


async def test_executor_that_drains_or_leaves_is_not_told_as_lost():
    async with served() as stub:
        executor = await Executor(stub).ready()
        gateway = Gateway(stub)
        await gateway.catalog("e1")
        executor.send(pb.RegisterRequest(draining=True))
        await gateway.catalog()
        await executor.end()
        await Executor(stub, "e2").ready()
        await gateway.catalog("e2")
        assert not gateway.lost


async def test_heartbeats_keep_an_executor():
    async with served(lease_seconds=0.3) as stub:
        executor, silent = await Executor(stub, "e1").ready(), await Executor(stub, "e2").ready()
        losing = asyncio.create_task(silent.read())
        while not losing.done():
            executor.send(pb.RegisterRequest(load=pb.Load(running=1)))
            await asyncio.wait([losing], timeout=0.02)
        assert list((await states(stub))[0]) == ["e1"]


async def test_executor_that_comes_back_in_time_serves_who_waited():
    async with served() as stub:
        executor = await Executor(stub).ready()
        await executor.end()
        gateway = Gateway(stub)
        await gateway.catalog()
        gateway.place(1)
        await Executor(stub, "e1-again").ready()
        assert (await gateway.grant()).executor_id == "e1-again"


async def test_no_executor_in_time_is_told():
    async with served(executor_wait_seconds=0.05) as stub:
        await (await Executor(stub).ready()).end()
        gateway = Gateway(stub)
        gateway.place(1)
        refusal = await gateway.refusal()
        assert refusal.reason == pb.REFUSAL_REASON_NO_EXECUTOR
        assert refusal.retry_after_ms > 0


async def test_new_scheduler_tells_that_more_executors_may_come_until_it_has_settled():
    async with served(settle_seconds=0.5) as stub:
        stream = Stream(stub.Place)
        assert (await stream.read()).catalog.more
        while (response := await stream.read()).catalog.more:
            pass
        assert response.HasField("catalog")


CALIBRATION = pb.Calibration(
    prefill=pb.StepCurve(sizes=[16, 256], seconds=[0.02, 0.2]),
    decode=pb.StepCurve(sizes=[1, 8], seconds=[0.01, 1 / 30]),
    decode_context=16,
    decode_token_seconds=1e-7,
)


async def test_calibration_of_an_executor_is_heard_and_told():
    async with served() as stub:
        executor = await Executor(stub, calibration=CALIBRATION, prefill_chunk=96).ready()
        told = (await states(stub))[0]["e1"].description
        assert (told.calibration, told.prefill_chunk) == (CALIBRATION, 96)
        await executor.end()


async def test_calibration_that_can_not_be_is_refused_by_field():
    async with served() as stub:
        with pytest.raises(grpc.aio.AioRpcError, match=r"description\.calibration.*must rise") as caught:
            await Executor(stub, calibration=pb.Calibration(prefill=pb.StepCurve(sizes=[2, 1], seconds=[1, 1]))).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_executor_without_identity_is_refused_by_field():
    async with served() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await Executor(stub, kv_blocks=0).read()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "description.kv_blocks" in caught.value.details()


async def test_restart_under_load_takes_leases_over_from_gateways_and_executors_in_any_order():
    async with scheduler() as (address, _), stub_of(address) as stub:
        await Executor(stub).ready()
        gateway = Gateway(stub)
        for request_id in (1, 2, 3):
            gateway.place(request_id)
        leases = [await gateway.grant(), await gateway.grant()]
    async with scheduler(listen=address, settle_seconds=5.0) as (_, _), stub_of(address) as stub:
        gateway = Gateway(stub)
        gateway.send(pb.PlaceRequest(announced=leases))
        gateway.place(3)
        executor = await Executor(stub).ready()
        executor.send(pb.RegisterRequest(load=pb.Load(running=2)))

        async def taken_over():
            found, queued = await states(stub)
            return found["e1"].leases == 2 and found["e1"].load.running == 2 and queued == 1

        await eventually(taken_over)
        gateway.send(pb.PlaceRequest(released=[leases[0].request_id]))
        assert (await gateway.grant()).request_id == 3


HANDS_OVER = {"model_fingerprint": "v1", "features": ["export_kv", "import_kv"]}


async def pools(stub, **fields):
    prefill = await Executor(stub, "p", role=pb.ROLE_PREFILL, **HANDS_OVER, **fields).ready()
    return prefill, await Executor(stub, "d", role=pb.ROLE_DECODE, **HANDS_OVER, **fields).ready()


async def test_lease_names_both_executors_and_the_prefill_half_can_be_given_back_alone():
    async with served(placement="apart") as stub:
        await pools(stub, max_batch_size=1)
        gateway = Gateway(stub)
        gateway.place(1)
        lease = await gateway.grant()
        assert (lease.executor_id, lease.address, lease.tokens) == ("d", description("d").address, 15)
        prefill = lease.prefill
        assert (prefill.executor_id, prefill.address, prefill.tokens) == ("p", description("p").address, 10)
        assert lease.reason == pb.PLACEMENT_REASON_POLICY

        async def leased():
            found, _ = await states(stub)
            return {name: (state.leases, state.prefill_leases) for name, state in found.items()}

        assert await leased() == {"p": (1, 1), "d": (1, 0)}
        gateway.send(pb.PlaceRequest(prefilled=[1]))

        async def given_back():
            return await leased() == {"p": (0, 0), "d": (1, 0)}

        await eventually(given_back)


async def test_reason_is_told_of_what_runs_together_too():
    async with served() as stub:
        await Executor(stub).ready()
        gateway = Gateway(stub)
        gateway.place(1)
        lease = await gateway.grant()
        assert lease.reason == pb.PLACEMENT_REASON_NO_PREFILL_EXECUTOR
        assert not lease.HasField("prefill")


async def test_restarted_scheduler_takes_both_halves_of_a_lease_over():
    async with scheduler(placement="apart") as (address, _), stub_of(address) as stub:
        await pools(stub)
        gateway = Gateway(stub)
        gateway.place(1)
        lease = await gateway.grant()
    async with scheduler(listen=address, settle_seconds=5.0) as (_, _), stub_of(address) as stub:
        gateway = Gateway(stub)
        gateway.send(pb.PlaceRequest(announced=[lease]))
        await pools(stub)

        async def taken_over():
            found, _ = await states(stub)
            return [(found[name].leases, found[name].prefill_leases) for name in "pd"] == [(1, 1), (1, 0)]

        await eventually(taken_over)


async def test_load_of_handoffs_is_heard_and_told():
    async with served() as stub:
        executor = await Executor(stub).ready()
        failing = [pb.FailingPeer(executor_id="e2", sends=True, failures=3)]
        load = pb.Load(running=1, receiving=2, sending=3, handoff_bytes_per_second=1e9, failing=failing)
        executor.send(pb.RegisterRequest(load=load))

        async def told():
            return (await states(stub))[0]["e1"].load == load

        await eventually(told)


async def test_metrics_tell_each_pool():
    async with scheduler(placement="apart", metrics="127.0.0.1:0") as (address, server), stub_of(address) as stub:
        prefill, _ = await pools(stub, kv_blocks=100, max_batch_size=1)
        gateway = Gateway(stub)
        gateway.place(1)
        await gateway.grant()
        gateway.place(2)
        prefill.send(pb.RegisterRequest(load=pb.Load(running=1, waiting=2, waiting_tokens=7, kv_blocks_free=25)))

        async def heard():
            found, queued = await states(stub)
            return found["p"].load.waiting == 2 and queued == 1

        await eventually(heard)
        async with httpx.AsyncClient() as http:
            text = (await http.get(f"http://{server._metrics.address}/metrics")).text
    for line in (
        'penstock_scheduler_placed_total{how="apart",model_name="m",reason="policy"} 1.0',
        'penstock_scheduler_executors{model_name="m",role="prefill",state="live"} 1.0',
        'penstock_pool_leases{half="prefill",model_name="m",role="prefill"} 1.0',
        'penstock_pool_leases{half="decode",model_name="m",role="decode"} 1.0',
        'penstock_pool_requests_running{model_name="m",role="prefill"} 1.0',
        'penstock_pool_requests_waiting{model_name="m",role="prefill"} 2.0',
        'penstock_pool_waiting_prompt_tokens{model_name="m",role="prefill"} 7.0',
        'penstock_pool_queue{model_name="m",role="decode"} 1.0',
        'penstock_pool_leased_tokens{model_name="m",role="decode"} 15.0',
        'penstock_pool_kv_cache_usage_perc{model_name="m",role="prefill"} 0.75',
    ):
        assert line in text


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
        'penstock_num_requests_waiting{model_name="m"} 1.0',
        'penstock_request_queue_time_seconds_count{model_name="m"} 1.0',
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


async def test_draining_scheduler_ends_the_streams_of_gateways_and_refuses_nothing():
    async with scheduler() as (address, server), stub_of(address) as stub:
        await Executor(stub, max_batch_size=1).ready()
        gateway = Gateway(stub)
        gateway.place(1)
        await gateway.grant()
        gateway.place(2)

        async def waits():
            return (await states(stub))[1] == 1

        await eventually(waits)
        draining = asyncio.create_task(server.drain())
        assert await last_of(gateway) == []
        assert await gateway.call.code() is grpc.StatusCode.OK
        async with asyncio.timeout(WAIT):
            await draining
        late = Gateway(stub)
        late.place(3)
        assert await last_of(late) == []
        assert (await states(stub))[1] == 0


async def last_of(gateway):
    """Refusals until the stream ends."""
    refused = []
    while (response := await gateway.read()) is not grpc.aio.EOF:
        refused += response.refused
    return refused


async def test_lease_that_is_granted_as_the_scheduler_drains_is_told():
    async with scheduler() as (address, server), stub_of(address) as stub:
        await Executor(stub, max_batch_size=1).ready()
        gateway = Gateway(stub)
        gateway.place(1)
        await gateway.grant()
        server._driver._outboxes[1].response.granted.add(request_id=7)
        async with asyncio.timeout(WAIT):
            await server.drain()
        assert (await gateway.grant()).request_id == 7
