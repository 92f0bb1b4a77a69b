"""`penstock.v1.Models`: the catalog, with the load that the scheduler knows of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc.aio

from penstock.gateway.auth import Keys
from penstock.gateway.catalog import Catalog, Executor, Model
from penstock.gateway.grpc_door.callers import bearer_of
from penstock.gateway.placement import SchedulerPlacement
from penstock.internal.v1 import scheduler_pb2
from penstock.v1 import models_pb2, models_pb2_grpc

__all__ = ["ModelsServicer"]

Context = grpc.aio.ServicerContext[Any, Any]
States = Mapping[str, scheduler_pb2.ExecutorState]

# The load is told where the scheduler answers at once; the models are told in any case.
_PATIENCE_SECONDS = 1.0

_ROLES = {scheduler_pb2.ROLE_BOTH: "both", scheduler_pb2.ROLE_PREFILL: "prefill", scheduler_pb2.ROLE_DECODE: "decode"}


class ModelsServicer(models_pb2_grpc.ModelsServicer):
    """The RPCs over the catalog."""

    def __init__(self, catalog: Catalog, placement: SchedulerPlacement, keys: Keys) -> None:
        self._catalog = catalog
        self._placement = placement
        self._keys = keys

    async def ListModels(self, request: models_pb2.ListModelsRequest, context: Context) -> models_pb2.ListModelsResponse:
        self._authenticate(context)
        states = await self._states()
        return models_pb2.ListModelsResponse(models=[_model(m, states) for m in self._catalog.models().values()])

    async def GetModel(self, request: models_pb2.GetModelRequest, context: Context) -> models_pb2.GetModelResponse:
        self._authenticate(context)
        model = self._catalog.live(request.name or self._catalog.model("", "name").name)
        return models_pb2.GetModelResponse(model=_model(model, await self._states()))

    def _authenticate(self, context: Context) -> None:
        self._keys.tenant(bearer_of(context))

    async def _states(self) -> States:
        try:
            listed = await self._placement.list_executors(_PATIENCE_SECONDS)
        except grpc.aio.AioRpcError:
            return {}
        return {state.description.executor_id: state for state in listed.executors}


def _model(model: Model, states: States) -> models_pb2.Model:
    return models_pb2.Model(
        name=model.name,
        fingerprint=model.first.model_fingerprint,
        architecture=model.first.architecture,
        context_length=model.context_length,
        vocabulary_size=model.vocabulary_size,
        executors=[_executor(e, states.get(e.executor_id)) for e in model.executors],
        created_unix_seconds=model.created,
    )


def _executor(executor: Executor, state: scheduler_pb2.ExecutorState | None) -> models_pb2.ModelExecutor:
    message = models_pb2.ModelExecutor(
        executor_id=executor.executor_id,
        backend=executor.backend,
        device=executor.device,
        dtype=executor.dtype,
        kv_blocks=executor.kv_blocks,
        backend_version=executor.backend_version,
        features=executor.features,
        kv_layout=executor.kv_layout,
        kv_dtype=executor.kv_dtype,
    )
    if state is not None:
        message.running = state.load.running
        message.waiting = state.load.waiting
        message.kv_blocks_free = state.load.kv_blocks_free
        message.draining = state.draining
        message.role = _ROLES.get(state.description.role, "")
        if state.description.HasField("calibration"):
            message.calibration.CopyFrom(_calibration(state.description))
    return message


def _calibration(description: scheduler_pb2.ExecutorDescription) -> models_pb2.Calibration:
    prefill, decode = description.calibration.prefill, description.calibration.decode
    return models_pb2.Calibration(
        prefill_tokens_per_second=max((n / s for n, s in zip(prefill.sizes, prefill.seconds, strict=True)), default=0.0),
        decode=[
            models_pb2.DecodeSpeed(batch=n, tokens_per_second=n / s) for n, s in zip(decode.sizes, decode.seconds, strict=True)
        ],
        prefill_chunk=description.prefill_chunk,
    )
