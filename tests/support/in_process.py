"""Whole clusters in this process: the services' own servers on a thread with an event loop, over real gRPC on loopback."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

from suite import wait_for

from penstock.client import Client
from penstock.common.service import Service
from penstock.common.sources import resolve
from penstock.executor.config import ExecutorConfig
from penstock.executor.server import ExecutorServer
from penstock.gateway.config import GatewayConfig
from penstock.gateway.server import GatewayServer
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.server import SchedulerServer
from penstock.tokenizer.config import TokenizerConfig
from penstock.tokenizer.server import TokenizerServer

FREE = "127.0.0.1:0"


class InProcess:
    """Starts services, and ends them in the reverse order."""

    def __init__(self):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._services: list[Service] = []

    def do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(120)

    def start(self, service: Service) -> dict[str, str]:
        self._services.append(service)
        return dict(self.do(service.start()))

    def close(self):
        while self._services:
            self.do(self._services.pop().close())
        left = self.do(self._tasks_that_stay())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        assert not left, f"tasks that no service has ended: {left}"

    @staticmethod
    async def _tasks_that_stay():
        """Those that do not end by themselves now that every service has."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        return (await asyncio.wait(others, timeout=5))[1] if others else None


@contextlib.contextmanager
def cluster(executors: Sequence[ExecutorConfig], placement: str, model: str = "builtin") -> Iterator[str]:
    """A cluster of these executors, all of which serve `model`; its gRPC door, once all are listed."""
    running = InProcess()
    with contextlib.closing(running):
        scheduler = running.start(SchedulerServer(SchedulerConfig(listen=FREE, placement=placement)))["grpc"]
        tokenizer = running.start(TokenizerServer(TokenizerConfig(listen=FREE, models=(f"{model}={resolve(model)}",))))["grpc"]
        for config in executors:
            running.start(ExecutorServer(replace(config, model=model, scheduler=scheduler, listen=FREE)))
        gateway = running.start(GatewayServer(GatewayConfig(http=FREE, grpc=FREE, scheduler=scheduler, tokenizer=tokenizer)))
        with Client(gateway["grpc"], timeout=30, retries=20) as client:
            listed = wait_for(lambda: sum(len(served.executors) for served in client.models()) == len(executors))
            assert listed, "an executor does not register"
        yield gateway["grpc"]
