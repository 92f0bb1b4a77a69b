"""Reading a request's body, bounded before memory is taken."""

from __future__ import annotations

import asyncio
import contextlib

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from penstock.common.errors import DeadlineExceeded, InvalidRequest, RequestTooLarge, UnsupportedField

__all__ = ["DISCARDED_BYTES", "DISCARD_SECONDS", "SlowBody", "UnreadResponse", "read_body"]

# What is thrown away, part by part, so that a client which sends on before it reads still sees the answer.
DISCARDED_BYTES = 256 << 20
DISCARD_SECONDS = 5.0


class SlowBody(DeadlineExceeded):
    """The body did not come in time."""


async def read_body(scope: Scope, receive: Receive, most: int, seconds: float) -> bytes:
    """The body, of at most so many bytes and within so many seconds.

    Raises:
        SlowBody: it came too slowly.
        RequestTooLarge: it is larger, by its header or by what came; the rest is not read.
        InvalidRequest: its length is no number, or it is compressed.
        ClientDisconnect: the client left.
    """
    headers = Headers(scope=scope)
    codings = {coding.strip().lower() for coding in ",".join(headers.getlist("content-encoding")).split(",")}
    if codings - {"identity", ""}:
        raise UnsupportedField.field("Content-Encoding", "bodies are not unpacked here; send it as it is, and leave this out")
    declared = headers.get("content-length")
    if declared is not None:
        if not declared.isdecimal():
            raise InvalidRequest.field("Content-Length", "must be a number")
        if int(declared) > most:
            raise RequestTooLarge(f"the body has {int(declared)} bytes; at most {most} are taken")
    try:
        async with asyncio.timeout(seconds):
            return await _receive_all(receive, most)
    except TimeoutError:
        raise SlowBody(f"the body did not come within {seconds:g} seconds") from None


async def _receive_all(receive: Receive, most: int) -> bytes:
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


class UnreadResponse(Response):
    """Answers a request whose body was not read: closing on unsent data would tear the answer away from the client."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - as Starlette calls it
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                await _discard(receive)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _discard(receive: Receive) -> None:
    discarded = 0
    while discarded < DISCARDED_BYTES:
        message = await receive()
        discarded += len(message.get("body", b""))
        if not message.get("more_body", False):
            return
