"""When a cluster serves: every service's health says so, and the model is listed once all executors have registered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from penstock.cli.cluster.console import Console
from penstock.common.channel import connect
from penstock.internal.v1 import scheduler_pb2, scheduler_pb2_grpc
from penstock.v1 import models_pb2, models_pb2_grpc

__all__ = ["listed", "registered", "serving", "told"]

_POLL_SECONDS = 0.05
_CALL_SECONDS = 2.0


async def serving(address: str) -> None:
    """Return once the server's health is SERVING."""
    async with connect(address) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while True:
            try:
                answer = await check(health_pb2.HealthCheckRequest(), timeout=_CALL_SECONDS, wait_for_ready=True)
            except grpc.aio.AioRpcError:
                answer = None
            if answer is not None and answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            await asyncio.sleep(_POLL_SECONDS)


async def registered(scheduler: str, executors: int) -> None:
    """Return once so many executors have registered with the scheduler."""
    async with connect(scheduler) as channel:
        ask = scheduler_pb2_grpc.SchedulerServiceStub(channel).ListExecutors
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                answer = await ask(scheduler_pb2.ListExecutorsRequest(), timeout=_CALL_SECONDS)
                if len(answer.executors) >= executors:
                    return
            await asyncio.sleep(_POLL_SECONDS)


async def listed(gateway: str, model: str) -> None:
    """Return once the gateway lists the model. A gateway that wants an API key is taken at its health's word."""
    async with connect(gateway) as channel:
        get = models_pb2_grpc.ModelsStub(channel).GetModel
        while True:
            try:
                await get(models_pb2.GetModelRequest(name=model), timeout=_CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                    return
            else:
                return
            await asyncio.sleep(_POLL_SECONDS)


@asynccontextmanager
async def told(console: Console, what: str, every: float = 10.0) -> AsyncIterator[None]:
    """Say every so often that this is still being waited for."""

    async def tell() -> None:
        waited = 0.0
        while True:
            await asyncio.sleep(every)
            waited += every
            console.line("up", f"waiting for {what} ({waited:.0f} s)")

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()
