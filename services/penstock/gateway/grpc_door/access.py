"""The access log of the gRPC door."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from penstock.common.errors import status_of
from penstock.gateway.access import failed, line

__all__ = ["AccessLog"]

_PUBLIC = "/penstock.v1."
_WORK = "/penstock.v1.Inference/"


class AccessLog(grpc.aio.ServerInterceptor):
    """Writes a line for each call of the public services. It has to stand inside what turns errors into statuses."""

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler, method = await continuation(handler_call_details), str(handler_call_details.method)
        if handler is None or not method.startswith(_PUBLIC):
            return handler
        rebuild = grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        return rebuild(
            _logged(handler.unary_stream or handler.unary_unary, method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _logged(inner: Callable[[Any, Any], Awaitable[Any]], method: str) -> Callable[[Any, Any], Awaitable[Any]]:
    name, quiet = method.removeprefix("/"), not method.startswith(_WORK)

    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        with line("grpc", name, unanswered="UNKNOWN", quiet=quiet) as entry:
            try:
                answer = await inner(request, context)
            except asyncio.CancelledError:
                # None without a deadline, whatever the published types say.
                left: float | None = context.time_remaining()
                entry.status = "CANCELLED" if left is None or left > 0 else "DEADLINE_EXCEEDED"
                raise
            except Exception as error:
                entry.status = status_of(error)[0].name
                failed(error)
                raise
            entry.status = "OK"
            return answer

    return call
