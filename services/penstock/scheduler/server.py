"""Assembles the scheduler service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from penstock.common import metrics, tracing
from penstock.common.server import GrpcServer
from penstock.common.service import StartError
from penstock.internal.v1 import scheduler_pb2, scheduler_pb2_grpc
from penstock.scheduler.config import SchedulerConfig, check
from penstock.scheduler.core import Scheduler
from penstock.scheduler.driver import Driver
from penstock.scheduler.metrics import SchedulerMetrics
from penstock.scheduler.servicer import SchedulerServicer

__all__ = ["SchedulerServer"]

# For gateways that do not read; the others hear it at once.
_LAST_WORDS_SECONDS = 1.0
_NAME = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name


class SchedulerServer:
    """`penstock.common.service.Service`."""

    name = "scheduler"

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._driver: Driver | None = None
        self._server: GrpcServer | None = None
        self._metrics: metrics.MetricsServer | None = None

    async def start(self) -> Mapping[str, str]:
        """Serve. There is nothing to load."""
        check(self._config)
        tracing.configure(self.name, self._config.otlp_endpoint)
        core = Scheduler(self._config, asyncio.get_running_loop().time)
        counts = SchedulerMetrics(core)
        driver = self._driver = Driver(core, counts)
        server = self._server = GrpcServer()
        server.add(scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server, SchedulerServicer(self._config, core, driver), _NAME)
        try:
            bound = {"grpc": server.listen(self._config.listen)}
        except RuntimeError as error:
            raise StartError(f"can not listen on {self._config.listen}: {error}") from error
        if self._config.metrics:
            metrics.count_tasks(counts.registry)
            self._metrics = metrics.serve(counts.registry, self._config.metrics)
            bound["metrics"] = self._metrics.address
        await server.start()
        await server.set_serving(serving=True)
        return bound

    async def wait(self) -> None:
        """Nothing ends it from inside."""
        await asyncio.Event().wait()

    async def drain(self) -> None:
        """End the streams of gateways, and return when they have heard what was decided; then those of executors.

        Nothing waits here that they do not hold too: they ask the next scheduler for it, and sooner than this one would have had
        room. What runs needs none.
        """
        if self._driver is None or self._server is None:
            return
        await self._server.set_serving(serving=False)
        self._driver.end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await self._driver.ended.wait()
                self._driver.members.end()
                await self._driver.members.ended.wait()

    async def close(self) -> None:
        """End all streams."""
        if self._server is not None:
            await self._server.stop(0)
            self._server = None
        if self._driver is not None:
            self._driver.stop()
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
