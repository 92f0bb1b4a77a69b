"""Reading a request's body, bounded before memory is taken."""

from __future__ import annotations

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from penstock.common.errors import InvalidRequest, RequestTooLarge

__all__ = ["read_body"]


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """The body, of at most so many bytes.

    Raises:
        RequestTooLarge: it is larger, by its header or by what came; the rest is not read.
        InvalidRequest: its length is no number.
        ClientDisconnect: the client left.
    """
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), None)
    if declared is not None:
        if not declared.isdigit():
            raise InvalidRequest.field("Content-Length", "must be a number")
        if int(declared) > most:
            raise RequestTooLarge(f"the body has {int(declared)} bytes; at most {most} are taken")
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        part = message.get("body", b"")
        size += len(part)
        if size > most:
            raise RequestTooLarge(f"the body has more than {most} bytes; at most {most} are taken")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)
