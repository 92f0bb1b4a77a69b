"""A scheduler that begins, and one that drains."""

import asyncio

import grpc
import grpc.aio
from scheduler_wire import WAIT, Executor, Gateway, Stream, eventually, scheduler, served, states, stub_of

from penstock.internal.v1 import scheduler_pb2 as pb


async def test_new_scheduler_tells_that_more_executors_may_come_until_it_has_settled():
    async with served(settle_seconds=0.5) as stub:
        stream = Stream(stub.Place)
        assert (await stream.read()).catalog.more
        while (response := await stream.read()).catalog.more:
            pass
        assert response.HasField("catalog")


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
        assert await last_of(late, writes_cross=True) == []
        assert (await states(stub))[1] == 0


async def test_draining_scheduler_ends_the_streams_of_executors_behind_those_of_gateways():
    async with scheduler() as (address, server), stub_of(address) as stub:
        executor, gateway = await Executor(stub).ready(), Gateway(stub)
        gateway.place(1)
        await gateway.grant()
        async with asyncio.timeout(WAIT):
            await server.drain()
        assert await last_of(gateway) == []
        assert await executor.read() is grpc.aio.EOF
        assert await executor.call.code() is grpc.StatusCode.OK


async def last_of(gateway, *, writes_cross=False):
    """Refusals until the stream ends, which a write may cross: gRPC's client tells that as INTERNAL where the status is OK."""
    refused = []
    try:
        while (response := await gateway.read()) is not grpc.aio.EOF:
            refused += response.refused
    except grpc.aio.AioRpcError as error:
        if not writes_cross or "SendMessageOperation" not in error.debug_error_string():
            raise
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
