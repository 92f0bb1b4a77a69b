"""Requests that are placed, wait or are refused."""

import pytest
from scheduler_wire import Executor, Gateway, description, eventually, served, states

from penstock.internal.v1 import scheduler_pb2 as pb


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
