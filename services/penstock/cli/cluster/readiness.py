"""When a cluster serves: every service's health says so, its executors have registered, and the model is listed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from penstock.cli.cluster.console import Console
from penstock.cli.cluster.pools import Role
from penstock.cli.cluster.roles import ROLE_MESSAGES
from penstock.common.channel import connect
from penstock.common.config import ConfigError
from penstock.internal.v1 import executor_pb2, executor_pb2_grpc, scheduler_pb2, scheduler_pb2_grpc
from penstock.v1 import models_pb2, models_pb2_grpc

__all__ = ["executor_id", "listed", "registered", "serving", "told"]

_POLL_SECONDS = 0.05
_CALL_SECONDS = 2.0
_ROLE_SECONDS = 10.0


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


async def registered(scheduler: str, executor: str) -> str:
    """The id of the executor that listens at this address, once it has registered with the scheduler."""
    async with connect(scheduler) as channel:
        ask = scheduler_pb2_grpc.SchedulerServiceStub(channel).ListExecutors
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                mine = await executor_id(executor)
                answer = await ask(scheduler_pb2.ListExecutorsRequest(), timeout=_CALL_SECONDS)
                if mine in {state.description.executor_id for state in answer.executors}:
                    return mine
            await asyncio.sleep(_POLL_SECONDS)


async def executor_id(address: str, seconds: float = _CALL_SECONDS) -> str:
    """The id of the executor that listens there, if it answers within so many seconds.

    Raises:
        AioRpcError: it does not answer.
    """
    async with connect(address) as channel:
        ask = executor_pb2_grpc.ExecutorServiceStub(channel).GetExecutor
        answer = await ask(executor_pb2.GetExecutorRequest(), timeout=seconds, wait_for_ready=True)
        return answer.description.executor_id


async def give_role(scheduler: str, executor: str, role: Role) -> None:
    """Have the scheduler give an executor, by its id, another role; return once the executor has taken it on.

    Raises:
        AioRpcError: the scheduler does not; says why.
        ConfigError: the executor has not taken it on in time.
    """
    async with connect(scheduler) as channel:
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        wanted = ROLE_MESSAGES[role]
        await stub.SetRole(
            scheduler_pb2.SetRoleRequest(executor_id=executor, role=wanted), timeout=_ROLE_SECONDS, wait_for_ready=True
        )
        try:
            async with asyncio.timeout(_ROLE_SECONDS):
                while True:
                    if wanted in await _roles(stub, executor):
                        return
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            raise ConfigError(f"executor {executor} has not taken on the role within {_ROLE_SECONDS:g} s") from None


async def _roles(stub: scheduler_pb2_grpc.SchedulerServiceAsyncStub, executor: str) -> set[int]:
    """The role of the executor of this id, where it is registered."""
    answer = await stub.ListExecutors(scheduler_pb2.ListExecutorsRequest(), timeout=_ROLE_SECONDS, wait_for_ready=True)
    return {state.description.role for state in answer.executors if state.description.executor_id == executor}


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
            console.line("up", f"waiting for {what} ({waited:.0f} s)", event="waiting", what=what, seconds=waited)

    telling = asyncio.create_task(tell())
    try:
        yield
    finally:
        telling.cancel()
