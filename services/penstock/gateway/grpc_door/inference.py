"""`penstock.v1.Inference`: messages in, core calls, messages out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc.aio

from penstock.common.errors import InvalidRequest
from penstock.gateway.admission import Admission, Call
from penstock.gateway.auth import Keys
from penstock.gateway.bounds import MAX_COUNTED_TOKENS
from penstock.gateway.grpc_door.callers import caller_of
from penstock.gateway.grpc_door.messages import (
    Response,
    chat_generation,
    closing,
    conversation_input,
    generate_generation,
    prompt_input,
    response,
)
from penstock.gateway.request import Caller, Generation
from penstock.gateway.validation import validate_input
from penstock.v1 import inference_pb2, inference_pb2_grpc

__all__ = ["InferenceServicer"]

Context = grpc.aio.ServicerContext[Any, Any]


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """The RPCs over `Admission`."""

    def __init__(self, admission: Admission, keys: Keys, default_deadline_seconds: float) -> None:
        self._admission = admission
        self._keys = keys
        self._default_deadline_seconds = default_deadline_seconds

    async def Generate(self, request: inference_pb2.GenerateRequest, context: Context) -> None:  # type: ignore[override]  # it writes
        caller = self._caller(context)
        generation = generate_generation(request, self._admission.bounds(request.model))
        await self._run(generation, caller, inference_pb2.GenerateResponse, context)

    async def Chat(self, request: inference_pb2.ChatRequest, context: Context) -> None:  # type: ignore[override]  # it writes
        caller = self._caller(context)
        await self._run(chat_generation(request), caller, inference_pb2.ChatResponse, context)

    async def CountTokens(self, request: inference_pb2.CountTokensRequest, context: Context) -> inference_pb2.CountTokensResponse:
        caller = self._caller(context)
        match request.WhichOneof("input"):
            case "prompt":
                given = prompt_input(request.prompt, self._admission.bounds(request.model))
            case "conversation":
                given = conversation_input(request.conversation)
            case _:
                raise InvalidRequest.field("prompt", "is empty; give a prompt or a conversation")
        model = self._admission.catalog.model(request.model)
        generation = Generation(model=request.model, **given)
        validate_input(generation, model)
        with self._admission.counted():
            ids, _ = await self._admission.encode(generation, model, caller.deadline, MAX_COUNTED_TOKENS)
        return inference_pb2.CountTokensResponse(
            count=len(ids), token_ids=ids if request.token_ids else (), context_length=model.context_length
        )

    def _caller(self, context: Context) -> Caller:
        return caller_of(context, self._keys, self._default_deadline_seconds)

    async def _run(self, generation: Generation, caller: Caller, kind: Callable[..., Response], context: Context) -> None:
        with self._admission.counted():
            async with self._admission.admit([generation], caller) as call:
                await self._relay(call, caller, kind, context.write)

    async def _relay(self, call: Call, caller: Caller, kind: Callable[..., Response], write: Callable[[Response], Any]) -> None:
        queue = call.queue
        while deltas := await queue.take():
            queue.write_begins()
            for delta in deltas:
                await write(response(delta, kind))
            queue.write_ended()
        last = queue.closings[0]
        if last is not None:
            queue.write_begins()
            await write(kind(closing=closing(call, last, caller.request_id, self._admission.catalog)))
