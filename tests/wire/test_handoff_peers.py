"""Executors that know one another by the scheduler's word, and take on the role that it gives them."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

from executor_pair import executor, hand_over

from penstock.common.channel import connect
from penstock.internal.v1 import executor_pb2 as pb
from penstock.internal.v1 import scheduler_pb2, scheduler_pb2_grpc
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.server import SchedulerServer

PROMPT = list(range(100))


async def knows(side, *others):
    """Wait until the executor knows these and no others."""
    peers = side.server._exchange.peers
    while peers._peers.keys() != {other.id for other in others}:
        await peers.change()


@asynccontextmanager
async def pool(**settings):
    """A scheduler, its address, and two executors of different roles."""
    scheduler = SchedulerServer(SchedulerConfig(listen="127.0.0.1:0"))
    try:
        address = (await scheduler.start())["grpc"]
        async with AsyncExitStack() as stack:
            prefill = await stack.enter_async_context(executor(scheduler=address, role="prefill", **settings))
            decode = await stack.enter_async_context(executor(scheduler=address, role="decode", **settings))
            yield scheduler, address, prefill, decode
    finally:
        await scheduler.close()


async def test_peers_come_from_the_scheduler_and_stay_while_it_is_away():
    async with asyncio.timeout(30), pool() as (scheduler, _, prefill, decode):
        await asyncio.gather(knows(prefill, decode), knows(decode, prefill))
        await hand_over(prefill, decode, 1, PROMPT, 4)
        assert prefill.finished[1].reason == pb.SEQUENCE_FINISH_HANDED_OFF
        await scheduler.close()
        await hand_over(prefill, decode, 2, PROMPT[::-1], 4)
        assert prefill.finished[2].reason == pb.SEQUENCE_FINISH_HANDED_OFF


async def test_peers_stay_when_the_scheduler_comes_back_and_knows_nobody_yet():
    async with asyncio.timeout(30), pool() as (scheduler, address, prefill, decode):
        await asyncio.gather(knows(prefill, decode), knows(decode, prefill))
        await scheduler.close()
        decode.server._tasks[-1].cancel()  # it does not register again meanwhile
        # It stays unsettled for as long as the test takes.
        restarted = SchedulerServer(SchedulerConfig(listen=address, settle_seconds=60.0))
        await restarted.start()
        try:
            await prefill.server._exchange.peers.change()
            await hand_over(prefill, decode, 1, PROMPT, 4)
            assert prefill.finished[1].reason == pb.SEQUENCE_FINISH_HANDED_OFF
        finally:
            await restarted.close()


async def test_an_executor_that_leaves_is_nobodys_peer_any_more():
    async with asyncio.timeout(30), pool() as (_, address, prefill, decode):
        async with executor(scheduler=address, role="decode") as third:
            await asyncio.gather(knows(prefill, decode, third), knows(third, prefill, decode))
        await asyncio.gather(knows(prefill, decode), knows(decode, prefill))


async def test_scheduler_hears_between_whom_handoffs_fail_until_one_succeeds():
    async with asyncio.timeout(30), pool(handoff_lease_seconds=1) as (_, address, prefill, decode), connect(address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)

        async def told(wanted):
            failing = None
            while failing != wanted:
                executors = (await stub.ListExecutors(scheduler_pb2.ListExecutorsRequest())).executors
                peers = ((e.description.executor_id, peer) for e in executors for peer in e.load.failing)
                failing = [(own, peer.executor_id, peer.sends, peer.failures) for own, peer in peers]

        await asyncio.gather(knows(prefill, decode), knows(decode, prefill))
        await decode.start(1, PROMPT, 4, receive=pb.ReceiveKv(prefill_executor_id=prefill.id))
        await decode.until(lambda: 1 in decode.finished)
        assert decode.finished[1].handoff_failure == pb.HANDOFF_FAILURE_LEASE_EXPIRED
        await told([(decode.id, prefill.id, False, 1)])
        await hand_over(prefill, decode, 2, PROMPT, 4)
        await told([])


async def test_a_role_that_is_given_to_a_live_executor_is_its_own_from_then_on():
    async with asyncio.timeout(30), pool() as (_, address, prefill, decode), connect(address) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)

        async def roles():
            executors = (await stub.ListExecutors(scheduler_pb2.ListExecutorsRequest())).executors
            return {e.description.executor_id: e.description.role for e in executors}

        await asyncio.gather(knows(prefill, decode), knows(decode, prefill))
        assert await roles() == {prefill.id: scheduler_pb2.ROLE_PREFILL, decode.id: scheduler_pb2.ROLE_DECODE}
        flipped = {prefill.id: scheduler_pb2.ROLE_DECODE, decode.id: scheduler_pb2.ROLE_PREFILL}
        for executor_id, role in flipped.items():
            await stub.SetRole(scheduler_pb2.SetRoleRequest(executor_id=executor_id, role=role))
        told = await roles()
        while told != flipped:
            told = await roles()
        assert (await prefill.state()).description.role == scheduler_pb2.ROLE_DECODE
        # Nothing that either does depends on it.
        await hand_over(prefill, decode, 1, PROMPT, 4)
        assert prefill.finished[1].reason == pb.SEQUENCE_FINISH_HANDED_OFF
