"""Assembly of the executor service."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from penstock.backends.ranking import Standing, Verdict
from penstock.common import metrics as endpoint
from penstock.common import proofs, tracing
from penstock.common.addresses import reachable
from penstock.common.fingerprint import tokenizer_fingerprint
from penstock.common.logs import logger
from penstock.common.server import GrpcServer
from penstock.common.service import StartError
from penstock.common.waiting import tell_waiting
from penstock.executor.config import ExecutorConfig
from penstock.executor.engine import EngineDead
from penstock.executor.handoff.exchange import Exchange, settings_of
from penstock.executor.handoff.framing import serve_stream
from penstock.executor.handoff.handoffs import Settings
from penstock.executor.handoff.identity import Identity
from penstock.executor.handoff.metrics import HandoffMetrics
from penstock.executor.handoff.servicer import HandoffServicer
from penstock.executor.loading import Loaded, create, prepare
from penstock.executor.messages import describe
from penstock.executor.metrics import ExecutorMetrics
from penstock.executor.registration import Registration
from penstock.executor.servicer import ExecutorServicer
from penstock.internal.v1 import executor_pb2_grpc, scheduler_pb2

__all__ = ["ExecutorServer"]

_NAME = "penstock.internal.v1.ExecutorService"
_HANDOFF_NAME = "penstock.internal.v1.HandoffService"
_WATCH_SECONDS = 0.25
_FAREWELL_SECONDS = 2.0


class ExecutorServer:
    """The executor service, as `penstock.common.service.Service`."""

    name = "executor"

    def __init__(self, config: ExecutorConfig) -> None:
        self._config = config
        self._loaded: Loaded | None = None
        self._grpc: GrpcServer | None = None
        self._endpoint: endpoint.MetricsServer | None = None
        self._registration: Registration | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._dead: asyncio.Future[str] | None = None
        self._serving = False
        self._servicer = ExecutorServicer()
        self._handoff_servicer = HandoffServicer()
        self._exchange: Exchange | None = None

    async def start(self) -> Mapping[str, str]:
        """Bind, load the model while health says NOT_SERVING, then serve."""
        config = self._config
        tracing.configure(self.name, config.otlp_endpoint)
        settings = settings_of(config)
        began = time.monotonic()
        server = self._grpc = GrpcServer()
        try:
            bound = {"grpc": server.listen(config.listen)}
        except RuntimeError as error:
            raise StartError(f"listen: can not listen on {config.listen}: {error}") from error
        server.add(executor_pb2_grpc.add_ExecutorServiceServicer_to_server, self._servicer, _NAME)
        server.add(serve_stream, self._handoff_servicer, _HANDOFF_NAME)
        await server.start()
        loaded = self._loaded = await self._load()
        description = describe(
            loaded,
            executor_id=uuid.uuid4().hex,
            address=config.advertise or reachable(bound["grpc"]),
            tokenizer=tokenizer_fingerprint(loaded.folder),
        )
        description.role = scheduler_pb2.Role.Value(f"ROLE_{config.role.upper()}")
        exchange = self._exchange = _exchange(loaded, description, settings)
        self._handoff_servicer.serve(exchange.door)
        metrics = ExecutorMetrics(loaded.engine, loaded.name)
        metrics.registry.register(HandoffMetrics(exchange.handoffs.counts, loaded.name))
        if config.metrics is not None:
            endpoint.count_tasks(metrics.registry)
            self._endpoint = endpoint.serve(metrics.registry, config.metrics)
            bound["metrics"] = self._endpoint.address
        self._start_engine(loaded)
        self._servicer.serve(loaded.engine, description)
        await self._set_serving(serving=True)
        self._spawn(self._watch())
        if config.scheduler is not None:
            self._registration = Registration(config.scheduler, description, loaded.engine, self._healthy, self._why, exchange)
            self._spawn(self._registration.run())
            self._spawn(tell_waiting("scheduler", config.scheduler, self._registration.kept))
        else:
            logger().warning("registers with no scheduler, so that no request comes: --scheduler HOST:PORT names one")
        logger().info(
            "model loaded",
            model=loaded.name,
            backend=loaded.backend,
            device=loaded.model.device,
            dtype=loaded.model.dtype.value,
            kv_blocks=loaded.model.kv.blocks,
            context_length=loaded.engine.context_length,
            seconds=round(time.monotonic() - began, 3),
        )
        return bound

    async def wait(self) -> None:
        """Return never; raise when the engine is dead or does not come back, or nothing keeps it registered or watched any more.

        Raises:
            EngineDead: so that the process ends and its supervisor starts another.
        """
        if self._dead is None:
            return
        reason = await asyncio.shield(self._dead)
        # Who watches health, and the scheduler, hear it from the executor itself; gateways then place elsewhere what ran here.
        await self._set_serving(serving=False, why=reason)
        if self._registration is not None:
            await self._registration.leave(_FAREWELL_SECONDS)
        raise EngineDead(reason)

    async def drain(self) -> None:
        """Refuse new sequences, and return when the running ones have finished and been told."""
        if self._loaded is None:
            return
        engine = self._loaded.engine
        engine.drain()
        await self._set_serving(serving=False, why="the executor is draining")
        if self._registration is not None:
            self._registration.drain()
        await asyncio.to_thread(engine.wait_until_idle)

    async def close(self) -> None:
        """End everything and give the model's memory back."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        if self._exchange is not None:
            await self._exchange.close()
            self._exchange = None
        if self._grpc is not None:
            # What was told last is still on its way.
            await self._grpc.stop(0.5 if self._loaded is not None and self._loaded.engine.draining else 0)
            self._grpc = None
        if self._loaded is not None:
            await asyncio.to_thread(self._loaded.engine.close)
            self._servicer.close()
            self._loaded = None
        if self._endpoint is not None:
            self._endpoint.close()
            self._endpoint = None

    async def _load(self) -> Loaded:
        """The model, in time. A backend that does not come back is left behind in its thread: the process ends."""
        config, servicer = self._config, self._servicer
        servicer.failure = "the checkpoint is read and the backends are asked"
        prepared = await asyncio.to_thread(prepare, config)
        backend = prepared.selection.registration.name
        servicer.failure = f"backend {backend} loads {prepared.spec.name}"
        logger().info("backend chosen", backend=backend, **_why(prepared.selection.standings))
        try:
            async with asyncio.timeout(config.load_seconds):
                return await asyncio.to_thread(create, prepared)
        except TimeoutError as error:
            raise StartError(
                f"backend {backend} has not loaded {prepared.spec.name} within {config.load_seconds:g} s: it hangs, or needs more "
                "--load-seconds"
            ) from error

    def _healthy(self) -> bool:
        engine = None if self._loaded is None else self._loaded.engine
        return engine is not None and engine.failure is None and (self._serving or engine.draining)

    def _why(self) -> str:
        return self._servicer.failure

    def _start_engine(self, loaded: Loaded) -> None:
        loop = asyncio.get_running_loop()
        self._dead = loop.create_future()

        def on_death(reason: str) -> None:
            loop.call_soon_threadsafe(self._die, reason)

        loaded.engine.on_death = on_death
        loaded.engine.start()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._die(f"a task of the executor failed: {error!r}")

    def _die(self, reason: str) -> None:
        if self._dead is not None and not self._dead.done():
            self._dead.set_result(reason)

    async def _watch(self) -> None:
        """Let health tell whether the engine makes progress, and end with one that does not come back to it."""
        stalled = 0.0
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            if self._loaded is None:
                return
            engine = self._loaded.engine
            moves = engine.progress(time.monotonic())
            if moves is not self._serving and not engine.draining:
                why = "" if moves else engine.failure or f"a step of backend {self._loaded.backend} takes longer than it may"
                logger().warning("the engine moves again" if moves else "the engine is stalled", failure=why)
                await self._set_serving(serving=moves, why=why)
            # Waits are counted, and not the clock's seconds: in those of a process that was stopped the engine could not move.
            stalled = 0.0 if moves else stalled + _WATCH_SECONDS
            if stalled >= self._config.stall_exit_seconds:
                self._die(f"a step of backend {self._loaded.backend} has not come back for {stalled:g} s beyond what it may take")

    async def _set_serving(self, *, serving: bool, why: str = "") -> None:
        self._serving = serving
        self._servicer.failure = why
        if self._grpc is not None:
            await self._grpc.set_serving(serving=serving)


def _exchange(loaded: Loaded, description: scheduler_pb2.ExecutorDescription, settings: Settings) -> Exchange:
    identity = Identity(description.executor_id, description.model_fingerprint, description.native_layout, proofs.mint())
    return Exchange(identity, loaded.engine, loaded.model.kv, description.vocabulary_size, settings)


def _why(standings: Sequence[Standing]) -> dict[str, object]:
    """What speaks for the chosen backend, and why each other one is not chosen."""
    chosen = next((s.reason for s in standings if s.verdict is Verdict.CHOSEN), "")
    others = [f"{s.report.name}: {s.verdict}: {s.reason}" for s in standings if s.reason and s.verdict is not Verdict.CHOSEN]
    return {"why": chosen, "others": others}
