"""The tokenizer's unary calls, and whether it is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from penstock.common import tracing
from penstock.common.errors import DeadlineExceeded, FieldViolation, InvalidRequest, Unavailable, error_from_status
from penstock.common.interceptors import request_id_metadata
from penstock.gateway.request import Generation
from penstock.internal.v1 import tokenizer_pb2, tokenizer_pb2_grpc

__all__ = ["Tokenization"]

# A tokenizer that is restarted is back well within this; a request waits that long for it.
_PATIENCE_SECONDS = 15.0
_PUBLIC_NAMES = {"text": "prompt", "token_ids": "prompt", "input": "prompt"} | {
    field: f"conversation.{field}" for field in ("messages", "continue_final_message", "chat_template_kwargs")
}


class Tokenization:
    """Encodes and decodes at once. Both may be asked again, so a lost call is repeated while there is time."""

    def __init__(self, channel: grpc.aio.Channel, clock: Callable[[], float], on_change: Callable[[], None]) -> None:
        self.serving = False
        self._stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        self._health = health_pb2_grpc.HealthStub(channel)
        self._clock = clock
        self._on_change = on_change

    async def run(self) -> None:
        """Follow the tokenizer's health, for ever."""
        while True:
            try:
                async for health in self._health.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                    self._set(serving=health.status == health_pb2.HealthCheckResponse.SERVING)
            except grpc.aio.AioRpcError:
                pass
            self._set(serving=False)
            await asyncio.sleep(0.1)

    def _set(self, *, serving: bool) -> None:
        self.serving = serving
        self._on_change()

    async def encode(self, model: str, generation: Generation, deadline: float, most: int) -> tuple[Sequence[int], str]:
        """A generation's prompt as ids, and the tokenizer's fingerprint. `most` ids are allowed.

        Raises:
            PenstockError: the tokenizer refused the input, or is not there.
        """
        request = tokenizer_pb2.EncodeRequest(model=model, add_special_tokens=True, max_tokens=most)
        if generation.messages is not None:
            turns = [tokenizer_pb2.ChatMessage(role=m.role, content=m.content, name=m.name) for m in generation.messages]
            chat = tokenizer_pb2.EncodeRequest.Chat(
                messages=turns,
                add_generation_prompt=generation.opens_answer,
                continue_final_message=generation.continue_final_message,
            )
            chat.chat_template_kwargs.update(generation.chat_template_kwargs)
            request.chat.CopyFrom(chat)
        else:
            request.text = generation.text or ""
        reply: tokenizer_pb2.EncodeResponse = await self._ask(self._stub.Encode, request, deadline)
        return reply.token_ids, reply.fingerprint

    async def detokenize(self, model: str, ids: Sequence[int], deadline: float, *, skip_special_tokens: bool) -> str:
        """The text of ids.

        Raises:
            PenstockError: the tokenizer refused them, or is not there.
        """
        request = tokenizer_pb2.DetokenizeRequest(model=model, token_ids=ids, skip_special_tokens=skip_special_tokens)
        reply: tokenizer_pb2.DetokenizeResponse = await self._ask(self._stub.Detokenize, request, deadline)
        return reply.text

    async def _ask(self, call: Callable[..., Any], request: Any, deadline: float) -> Any:
        patience = self._clock() + _PATIENCE_SECONDS
        metadata = (*tracing.metadata(), *request_id_metadata())
        while True:
            left = min(deadline, patience) - self._clock()
            try:
                return await call(request, timeout=max(0.001, left), wait_for_ready=True, metadata=metadata)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    if deadline <= patience:
                        raise DeadlineExceeded("the deadline passed while the prompt was encoded") from error
                    raise Unavailable("the tokenizer is not there", retry_after=1.0) from error
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise _public(error) from error
            await asyncio.sleep(0.05)


def _public(error: grpc.aio.AioRpcError) -> Exception:
    status = rpc_status.from_call(error)
    public = error_from_status(error.code(), status) if status is not None else Unavailable("the tokenizer failed")
    if isinstance(public, InvalidRequest):
        return type(public)(*(FieldViolation(_public_name(v.field), v.description) for v in public.violations))
    return public


def _public_name(field: str) -> str:
    head, bracket, rest = field.partition("[")
    return _PUBLIC_NAMES.get(head, head) + bracket + rest
