"""Reading a request's body, bounded before memory is taken."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from penstock.common.errors import InvalidRequest, RequestTooLarge

__all__ = ["answer_and_discard", "read_body"]

# What is thrown away, part by part, so that a client which sends on before it reads still sees the answer.
_DISCARDED_BYTES = 256 << 20
_DISCARD_SECONDS = 5.0


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


async def answer_and_discard(response: Response, receive: Receive, send: Send) -> None:
    """Answer a request whose body is not wanted: closing on unsent data would tear the answer away from the client."""
    await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": True})
    discarded = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while discarded < _DISCARDED_BYTES:
                message = await receive()
                discarded += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    await send({"type": "http.response.body", "body": b"", "more_body": False})
