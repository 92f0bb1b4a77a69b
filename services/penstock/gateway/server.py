"""Assembly of the gateway."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

import grpc.aio

from penstock.common import metrics as endpoint
from penstock.common import tracing
from penstock.common.channel import connect
from penstock.common.checks import check_numbers, check_peer
from penstock.common.errors import Unavailable
from penstock.common.events import EventLog
from penstock.common.logs import logger
from penstock.common.server import GrpcServer
from penstock.common.service import StartError
from penstock.common.tracing import Traceparents
from penstock.common.waiting import tell_waiting
from penstock.gateway.admission import Admission
from penstock.gateway.auth import load_keys
from penstock.gateway.catalog import Catalog
from penstock.gateway.config import GatewayConfig, check_origins
from penstock.gateway.decoding import TokenizerDecoding
from penstock.gateway.execution import ExecutorPool
from penstock.gateway.grpc_door.access import AccessLog
from penstock.gateway.grpc_door.inference import InferenceServicer
from penstock.gateway.grpc_door.malformed import MalformedRequests
from penstock.gateway.grpc_door.models import ModelsServicer
from penstock.gateway.history import History
from penstock.gateway.http_door.app import DRAINING, http_app
from penstock.gateway.http_door.connection import ConnectionBounds
from penstock.gateway.http_door.generate import Door
from penstock.gateway.http_door.server import HttpServer
from penstock.gateway.machine import Request
from penstock.gateway.metrics import GatewayMetrics
from penstock.gateway.placement import SchedulerPlacement
from penstock.gateway.ports import Ports
from penstock.gateway.tokenization import Tokenization
from penstock.gateway.validation import RequestLimits
from penstock.v1 import inference_pb2_grpc, models_pb2_grpc

__all__ = ["GatewayServer"]

_SWEEP_SECONDS = 1.0
# Time to send what calls that are broken off end with.
_LAST_WORDS_SECONDS = 1.0


class GatewayServer:
    """The gateway, as `penstock.common.service.Service`."""

    name = "gateway"

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._draining = False
        self._tasks: list[asyncio.Task[None]] = []
        self._channels: list[grpc.aio.Channel] = []
        self._grpc: GrpcServer | None = None
        self._http: HttpServer | None = None
        self._endpoint: endpoint.MetricsServer | None = None
        self._events: EventLog | None = None
        self._changed = asyncio.Event()
        self._failed: asyncio.Future[None] | None = None

    async def start(self) -> Mapping[str, str]:
        config = self._config
        check_numbers(config, may_be_zero=("model_memory_seconds", "grace_seconds"))
        check_peer("tokenizer", config.tokenizer)
        check_peer("scheduler", config.scheduler)
        check_origins(config.cors_origins)
        keys = load_keys(config.api_keys)
        tracing.configure(self.name, config.otlp_endpoint)
        self._failed = asyncio.get_running_loop().create_future()
        self._connect()
        bounds = ConnectionBounds(
            max_head_bytes=config.max_head_bytes,
            head_seconds=config.head_seconds,
            max_http_connections=config.max_http_connections,
        )
        self._http = HttpServer(http_app(self._door(), self.metrics.registry, self.not_ready, config.cors_origins), bounds)
        self._grpc = GrpcServer(
            interceptors=[Traceparents(), AccessLog(), MalformedRequests()],
            max_receive_bytes=config.max_body_bytes,
            public=True,
        )
        inference = InferenceServicer(self.admission, keys, config.default_deadline_seconds)
        self._grpc.add(inference_pb2_grpc.add_InferenceServicer_to_server, inference, "penstock.v1.Inference")
        models = ModelsServicer(self.catalog, self.placement, keys)
        self._grpc.add(models_pb2_grpc.add_ModelsServicer_to_server, models, "penstock.v1.Models")
        bound = {}
        try:
            bound["grpc"] = self._grpc.listen(config.grpc)
        except RuntimeError as error:
            raise StartError(f"grpc: can not listen on {config.grpc}: {error}") from error
        await self._grpc.start()
        bound["http"] = await self._http.start(config.http)
        if config.metrics is not None:
            self._endpoint = endpoint.serve(self.metrics.registry, config.metrics)
            bound["metrics"] = self._endpoint.address
        for run in (self.placement.run(), self.decoding.run(), self.tokenization.run(), self._sweep(), self._tell_health()):
            self._spawn(run)
        self._spawn(tell_waiting("scheduler", config.scheduler, lambda: self.placement.connected))
        self._spawn(tell_waiting("tokenizer", config.tokenizer, lambda: self.tokenization.serving))
        return bound

    def _connect(self) -> None:
        """The core and its adapters."""
        config, clock = self._config, time.monotonic
        self.metrics = GatewayMetrics()
        self.catalog = Catalog(config.model_memory_seconds, clock)
        if config.event_log is not None:
            self._events = EventLog(Path(config.event_log), self.name)
        history = None if self._events is None else History(self._events)
        scheduler, tokenizer, decoder = (connect(a) for a in (config.scheduler, config.tokenizer, config.tokenizer))
        self._channels = [scheduler, tokenizer, decoder]
        self.placement = SchedulerPlacement(scheduler, self.catalog, clock, self._on_catalog, self._lose_executor)
        # A channel of its own: a long prompt must not hold up everybody's tokens.
        self.decoding = TokenizerDecoding(decoder)
        self.execution = ExecutorPool(clock, self.decoding.flush, None if history is None else history.token)
        self.tokenization = Tokenization(tokenizer, clock, self._changed.set)
        self.admission = Admission(
            self.catalog,
            self.tokenization,
            Ports(self.placement, self.execution, self.decoding),
            RequestLimits(max_tokens=config.max_tokens_per_request, max_choices=config.max_choices, max_prompts=config.max_prompts),
            clock=clock,
            on_done=self._note_done,
            max_live=config.max_live_requests,
            max_attempts=config.max_attempts,
            slow_reader_seconds=config.slow_reader_seconds,
            new_request=Request if history is None else history.request,
        )
        endpoint.count_tasks(self.metrics.registry)
        self.metrics.watch(self.admission.requests)
        self.metrics.gauge("gateway_calls", "Calls in work, those being encoded included", lambda: self.admission.live)
        self.metrics.gauge("gateway_placings", "Requests that are queued or leased", lambda: self.placement.live)
        self.metrics.gauge("gateway_sequences", "Sequences on executors", lambda: self.execution.live)
        self.metrics.gauge("gateway_decodings", "Decodings on the tokenizer", lambda: self.decoding.live)

    def _door(self) -> Door:
        config = self._config
        return Door(
            admission=self.admission,
            keys=load_keys(config.api_keys),
            max_body_bytes=config.max_body_bytes,
            body_seconds=config.body_seconds,
            default_deadline_seconds=config.default_deadline_seconds,
            keepalive_seconds=config.sse_keepalive_seconds,
        )

    def counts(self) -> Mapping[str, int]:
        """What is held on behalf of requests; all zero when none is in work."""
        return {
            "calls": self.admission.live,
            "requests": len(self.admission.requests),
            "placings": self.placement.live,
            "sequences": self.execution.live,
            "decodings": self.decoding.live,
        }

    def not_ready(self) -> str:
        """Why no request can be served now; nothing if one can."""
        if self._draining:
            return DRAINING
        if not self.placement.connected:
            return "no scheduler"
        if not self.tokenization.serving:
            return "no tokenizer"
        return "" if self.catalog.models() else "no executor"

    def _note_done(self, request: Request) -> None:
        """Count it once its last text is on its way: some fifteen figures, and the client waits for none."""
        asyncio.get_running_loop().call_soon(self.metrics.done, request)

    def _on_catalog(self) -> None:
        self.execution.keep([e.executor_id for m in self.catalog.models().values() for e in m.executors])
        self._changed.set()

    def _lose_executor(self, executor_id: str, why: str) -> None:
        self.execution.lose(executor_id, why)

    async def _tell_health(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            if self._grpc is not None:
                await self._grpc.set_serving(serving=not self.not_ready())

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            self.admission.sweep()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        task.add_done_callback(self._ended)
        self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and self._failed is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def wait(self) -> None:
        if self._failed is not None:
            await asyncio.shield(self._failed)

    async def drain(self) -> None:
        self._draining = True
        self._changed.set()
        self.admission.refuse_new()
        if self._grpc is not None:
            await self._grpc.set_serving(serving=False)
        try:
            async with asyncio.timeout(self._config.grace_seconds):
                await self.admission.idle()
        except TimeoutError:
            logger().warning("drain cut short", grace_seconds=self._config.grace_seconds, calls=self.admission.live)
        self.admission.break_off_all(Unavailable("the gateway is leaving; ask again", retry_after=1.0))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_SECONDS):
                await self.admission.idle()
        self.admission.cancel_all(Unavailable("the gateway is leaving; ask again", retry_after=1.0))

    async def close(self) -> None:
        if self._http is not None:
            await self._http.close()
        if self._grpc is not None:
            await self._grpc.stop(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channels:
            await self.execution.close()
        for channel in self._channels:
            await channel.close()
        if self._endpoint is not None:
            self._endpoint.close()
        if self._events is not None:
            self._events.close()
        self._tasks, self._channels, self._grpc, self._http, self._endpoint = [], [], None, None, None
