"""Requests that are no message, such as text in invalid UTF-8: gRPC alone would call them an internal error."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from penstock.common.errors import InvalidRequest

__all__ = ["MalformedRequests"]


class _Malformed:
    """Stands for a request that could not be read."""


class MalformedRequests(grpc.aio.ServerInterceptor):
    """Refuses what can not be read as InvalidRequest."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.request_deserializer is None:
            return handler
        rebuild = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        return rebuild(
            _checked(handler.unary_stream or handler.unary_unary),
            request_deserializer=_tolerant(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


def _tolerant(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def tolerant(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            return _Malformed()

    return tolerant


def _checked(inner: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def call(request: Any, context: Any) -> Any:
        if isinstance(request, _Malformed):
            raise InvalidRequest.field("request", "must be a message of this method, with its texts in valid UTF-8")
        return inner(request, context)

    return call
