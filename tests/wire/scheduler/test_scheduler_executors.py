"""Executors that register, live, tell of themselves and are lost."""

import asyncio

import grpc
import grpc.aio
import pytest
from scheduler_wire import CALIBRATION, Executor, Gateway, served, states

from penstock.internal.v1 import scheduler_pb2 as pb


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
