"""The access log of the HTTP door, and the request id that stands in its lines and in every response."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.common.interceptors import REQUEST_ID_KEY, bind_request_id
from penstock.common.logs import logger
from penstock.gateway.access import line

__all__ = ["AccessLog"]

# As nginx tells it: the client left before there was an answer.
_CLIENT_LEFT = 499


class AccessLog:
    """An ASGI application around the door's own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = bind_request_id(Headers(scope=scope).get(REQUEST_ID_KEY))
        verb = scope["method"]
        # As it came, percent-encoded: a decoded path could hold anything.
        method = f"{verb} {scope['raw_path'][:200].decode('ascii', 'replace')}"
        with line("http", method, unanswered=_CLIENT_LEFT, quiet=verb == "GET") as entry:

            async def answer(message: Message) -> None:
                if message["type"] == "http.response.start":
                    entry.status = message["status"]
                    message["headers"] = [*message["headers"], (REQUEST_ID_KEY.encode(), request_id.encode())]
                await send(message)

            try:
                await self._app(scope, receive, answer)
            except Exception as error:  # noqa: BLE001 - it is answered by now, or the connection ends without an answer's end
                logger().error("request failed", method=method, exc_info=error)
