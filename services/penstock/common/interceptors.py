"""Server interceptors: every RPC gets a request id, and exceptions become statuses by the table of `penstock.common.errors`.

A status that an exception became bears the request id as trailing metadata, ``x-request-id``.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_status import rpc_status

from penstock.common.errors import PenstockError, status_of
from penstock.common.logs import logger

__all__ = [
    "REQUEST_ID_KEY",
    "ErrorsToStatuses",
    "RequestIds",
    "bind_request_id",
    "bound_request_id",
    "fit_request_id",
    "request_id_metadata",
]

REQUEST_ID_KEY = "x-request-id"
_MOST_CHARACTERS = 128
# What can be a header's value, metadata, and a word of a log line.
_UNFIT = re.compile(r"[^!-~]")


def fit_request_id(given: str | bytes | None) -> str:
    """The caller's request id, or a new one, of printable ASCII and at most 128 characters."""
    text = given.decode("latin-1") if isinstance(given, bytes) else given or ""
    return _UNFIT.sub("?", text[:_MOST_CHARACTERS]) or uuid.uuid4().hex


def bind_request_id(given: str | bytes | None) -> str:
    """Bind the caller's request id, or a new one, to the logs of the task and what it starts.

    Returns:
        the id, as `fit_request_id` has it.
    """
    request_id = fit_request_id(given)
    structlog.contextvars.bind_contextvars(request_id=request_id)
    return request_id


def bound_request_id() -> str:
    """The id that is bound; a new one where none is."""
    bound = structlog.contextvars.get_contextvars().get("request_id")
    return bound if isinstance(bound, str) else bind_request_id(None)


def request_id_metadata() -> tuple[tuple[str, str], ...]:
    """What a gRPC call to another service bears so that its log lines have the same id."""
    bound = structlog.contextvars.get_contextvars().get("request_id")
    return ((REQUEST_ID_KEY, bound),) if isinstance(bound, str) else ()


class RequestIds(grpc.aio.ServerInterceptor):
    """Binds the caller's ``x-request-id``, or a new one, to the logs of each call."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        bind_request_id(dict(handler_call_details.invocation_metadata or ()).get(REQUEST_ID_KEY))
        return await continuation(handler_call_details)


class ErrorsToStatuses(grpc.aio.ServerInterceptor):
    """Ends calls that raise with the status that the exception stands for; what is unknown is logged and told as INTERNAL."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        inner = handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary
        rebuild = _REBUILD[(bool(handler.request_streaming), bool(handler.response_streaming))]
        wrapped = (
            _streaming(inner, handler_call_details.method)
            if handler.response_streaming
            else _unary(inner, handler_call_details.method)
        )
        return rebuild(wrapped, request_deserializer=handler.request_deserializer, response_serializer=handler.response_serializer)


_REBUILD = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def _unary(inner: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await inner(request, context)
        except _PASSED_ON:
            raise
        except Exception as error:  # noqa: BLE001 - this is the one place that turns any exception into a status
            await _abort(error, context, method)

    return call


def _streaming(inner: Callable[[Any, Any], Any], method: str) -> Callable[[Any, Any], AsyncIterator[Any]]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        try:
            answers = inner(request, context)
            if hasattr(answers, "__aiter__"):
                async with contextlib.aclosing(answers):
                    async for answer in answers:
                        yield answer
            else:
                await answers
        except _PASSED_ON:
            raise
        except Exception as error:  # noqa: BLE001 - the same, for streams
            await _abort(error, context, method)

    return call


_PASSED_ON = (grpc.aio.AbortError, asyncio.CancelledError, GeneratorExit)


async def _abort(error: Exception, context: grpc.aio.ServicerContext[Any, Any], method: str) -> None:
    _, status = status_of(error)
    if not isinstance(error, PenstockError):
        logger().error("rpc failed", method=method, exc_info=error)
    told = rpc_status.to_status(status)
    await context.abort(told.code, told.details, (*told.trailing_metadata, *request_id_metadata()))
