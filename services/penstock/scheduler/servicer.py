"""`penstock.internal.v1.SchedulerService`: messages in, core calls, messages out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc.aio

from penstock.common import faults
from penstock.common.logs import logger
from penstock.internal.v1 import scheduler_pb2 as pb
from penstock.internal.v1 import scheduler_pb2_grpc
from penstock.scheduler import messages
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.core import Scheduler
from penstock.scheduler.driver import Driver
from penstock.scheduler.executors import Executor

__all__ = ["SchedulerServicer"]

_LONGEST = 500


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    """Streams of gateways and executors."""

    def __init__(self, config: SchedulerConfig, core: Scheduler, driver: Driver) -> None:
        self._lease_ms = int(config.lease_seconds * 1000)
        self._core = core
        self._driver = driver

    async def Place(
        self, request_iterator: AsyncIterator[pb.PlaceRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.PlaceResponse]:
        gateway = self._core.open_gateway()
        outbox = self._driver.connect(gateway)
        logger().info("gateway joined", gateway=gateway, peer=context.peer())
        reading = asyncio.create_task(self._read_places(gateway, request_iterator, outbox.close))
        try:
            async for response in outbox:
                yield response
            _raise_from(reading)
        finally:
            reading.cancel()
            self._driver.disconnect(gateway)
            self._core.close_gateway(gateway)
            self._driver.kick()
            logger().info("gateway left", gateway=gateway)

    async def _read_places(self, gateway: int, frames: AsyncIterator[pb.PlaceRequest], done: Callable[[], None]) -> None:
        try:
            async for frame in frames:
                _pass_points(frame)
                messages.apply_place(self._core, gateway, frame)
                self._driver.kick()
        finally:
            done()

    async def Register(
        self, request_iterator: AsyncIterator[pb.RegisterRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[pb.RegisterResponse]:
        first = await anext(aiter(request_iterator), None)
        if first is None:
            return
        executor = self._core.executors.join(messages.read_description(first.description))
        outbox = self._driver.members.join(first, executor, self._lease_ms)
        reading = asyncio.create_task(self._read_reports(executor, first, request_iterator, outbox.close))
        try:
            async for response in outbox:
                yield response
            _raise_from(reading)
        finally:
            reading.cancel()
            self._driver.members.leave(executor)
            if self._core.executors.leave(executor):
                logger().info("executor left", executor_id=executor.description.executor_id, model=executor.description.model)
            self._driver.kick()

    async def _read_reports(
        self, executor: Executor, first: pb.RegisterRequest, frames: AsyncIterator[pb.RegisterRequest], done: Callable[[], None]
    ) -> None:
        try:
            self._hear(executor, first)
            async for frame in frames:
                self._hear(executor, frame)
        finally:
            done()

    def _hear(self, executor: Executor, frame: pb.RegisterRequest) -> None:
        if frame.stalled:
            description = executor.description
            logger().warning(
                "executor stalled", executor_id=description.executor_id, model=description.model, failure=frame.failure[:_LONGEST]
            )
        messages.apply_register(self._core, executor, frame)
        self._driver.kick()

    async def ListExecutors(
        self, request: pb.ListExecutorsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.ListExecutorsResponse:
        return self._driver.list_executors()

    async def SetRole(self, request: pb.SetRoleRequest, context: grpc.aio.ServicerContext[Any, Any]) -> pb.SetRoleResponse:
        self._driver.members.set_role(request.executor_id, messages.read_role(request.role, "role"))
        return pb.SetRoleResponse()


def _raise_from(reading: asyncio.Task[None]) -> None:
    """What the reading of a stream failed with. It goes on where the scheduler ends the stream, and is cancelled with the call."""
    if reading.done() and not reading.cancelled():
        reading.result()


def _pass_points(frame: pb.PlaceRequest) -> None:
    if frame.place:
        faults.reach("scheduler.asked")
    if frame.prefilled:
        faults.reach("scheduler.prefilled")
