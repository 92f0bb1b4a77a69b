"""A suite through its gRPC door, by bare stubs, so that the load costs little beside what it measures."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version

import grpc
import grpc.aio

from penstock.cli.bench.scenarios import Request
from penstock.cli.bench.target import Description, of_all
from penstock.cli.bench.timeline import Timeline
from penstock.cli.connection import no_answer
from penstock.common.channel import CLIENT_OPTIONS, connect
from penstock.common.service import StartError
from penstock.v1 import inference_pb2, inference_pb2_grpc, models_pb2, models_pb2_grpc

__all__ = ["GrpcTarget"]

_LOOKUP_SECONDS = 10


class GrpcTarget:
    """Connects when it is made.

    Args:
        address: HOST:PORT.
        model: its served name; None: the one that is served.
        prefix_cache: False makes every request unlike any other to the suite's prefix cache.
        timeout: deadline of each request in seconds.
        tls: whether what answers there speaks TLS.
        api_key: key that the suite knows the caller by.

    Raises:
        StartError: nothing answers there, or it serves no such model.
    """

    def __init__(
        self, address: str, *, model: str | None, prefix_cache: bool, timeout: float, tls: bool = False, api_key: str | None = None
    ) -> None:
        self._runner = asyncio.Runner()
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._prefix_cache = prefix_cache
        self._timeout = timeout
        try:
            self._model = self._runner.run(self._connect(address, model, tls=tls))
        except BaseException:
            self._runner.close()
            raise

    @property
    def description(self) -> Description:
        dtype, backend = (of_all(getattr(executor, key) for executor in self._model.executors) for key in ("dtype", "backend"))
        return Description("penstock-grpc", version("penstock"), dtype, backend, self._model.vocabulary_size)

    def run(self, requests: Sequence[Request], finished: Callable[[], None]) -> list[Timeline]:
        return self._runner.run(self._run(requests, finished))

    def close(self) -> None:
        self._runner.run(self._channel.close())
        self._runner.close()

    async def _connect(self, address: str, name: str | None, *, tls: bool) -> models_pb2.Model:
        self._channel = _secured(address) if tls else connect(address)
        self._generate = inference_pb2_grpc.InferenceStub(self._channel).Generate
        models = models_pb2_grpc.ModelsStub(self._channel)
        try:
            listed = await models.ListModels(models_pb2.ListModelsRequest(), timeout=_LOOKUP_SECONDS, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise StartError(f"--api-key: {error.details()}") from error
            raise StartError(f"--target: {address}: {no_answer(error.details() or error.code().name)}") from error
        served = {m.name: m for m in listed.models if m.executors}
        if name is None and len(served) == 1:
            return next(iter(served.values()))
        if name not in served:
            raise StartError(f"--model: must be one of those that {address} serves: {', '.join(served) or 'none'}")
        return served[name]

    async def _run(self, requests: Sequence[Request], finished: Callable[[], None]) -> list[Timeline]:
        began = time.perf_counter()
        return await asyncio.gather(*(self._one(request, began, finished) for request in requests))

    async def _one(self, request: Request, began: float, finished: Callable[[], None]) -> Timeline:
        message = self._message(request)
        if request.at:
            await asyncio.sleep(began + request.at - time.perf_counter())
        timeline = Timeline(sent=time.perf_counter())
        try:
            async for answer in self._generate(message, timeout=self._timeout, metadata=self._metadata):
                if answer.token_ids:
                    timeline.bear(time.perf_counter(), answer.token_ids)
                elif answer.HasField("closing"):
                    timeline.ended = time.perf_counter()
        except grpc.aio.AioRpcError as error:
            timeline.error = f"{error.code().name}: {error.details()}"
        timeline.ended = timeline.ended or time.perf_counter()
        if timeline.error is None and len(timeline.ids) != request.new_tokens:
            timeline.error = f"{len(timeline.ids)} tokens came where {request.new_tokens} were asked for"
        finished()
        return timeline

    def _message(self, request: Request) -> inference_pb2.GenerateRequest:
        return inference_pb2.GenerateRequest(
            model=self._model.name,
            prompt=inference_pb2.Prompt(token_ids=inference_pb2.TokenIds(ids=request.prompt)),
            sampling=inference_pb2.Sampling(temperature=0),
            stopping=inference_pb2.Stopping(max_tokens=request.new_tokens, ignore_eos=True),
            reporting=inference_pb2.Reporting(token_ids=True),
            cache_salt="" if self._prefix_cache else secrets.token_hex(8),
        )


def _secured(address: str) -> grpc.aio.Channel:
    return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), options=CLIENT_OPTIONS)
