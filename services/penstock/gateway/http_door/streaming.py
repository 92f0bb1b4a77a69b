"""Server-sent events, and the watch over a client that may leave at any time."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Sequence
from typing import Any

from starlette.types import Receive, Send

from penstock.common.errors import PenstockError
from penstock.gateway.admission import Call
from penstock.gateway.answer import Closing, Delta
from penstock.gateway.http_door.errors import error_body
from penstock.gateway.http_door.rendering import Rendering

__all__ = ["collect", "stream", "while_connected"]

Headers = Sequence[tuple[bytes, bytes]]

_KEEPALIVE = b": keepalive\n\n"
_DONE = b"data: [DONE]\n\n"
_ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


async def while_connected(work: Awaitable[None], receive: Receive) -> None:
    """Do the work, and cancel it when the client leaves."""
    task = asyncio.ensure_future(work)
    watch = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.wait((task, watch))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect(call: Call) -> list[Delta]:
    """The whole answer, one delta a choice.

    Raises:
        PenstockError: a request failed.
    """
    whole: dict[int, Delta] = {}
    while deltas := await call.queue.take():
        for delta in deltas:
            known = whole.setdefault(delta.index, delta)
            if known is not delta:
                known.parts += delta.parts
                known.token_ids += delta.token_ids
                known.logprobs += delta.logprobs
                known.prompt_logprobs += delta.prompt_logprobs
                known.finish = delta.finish
    if call.failure is not None:
        raise call.failure  # nothing was sent yet
    return list(whole.values())


async def stream(
    call: Call, rendering: Rendering, send: Send, headers: Headers, *, keepalive_seconds: float, include_usage: bool, chat: bool
) -> None:
    """Send the answer as events. The response begins with the first of them, so what fails before is a plain error.

    Raises:
        PenstockError: a request failed before anything was sent.
    """
    queue = call.queue

    def events(deltas: Sequence[Delta]) -> bytes:
        # Before anything is awaited: more may be told then, and be counted, than these hold.
        return b"".join([_event(rendering.chunk(delta)) for delta in deltas])

    await queue.wait(keepalive_seconds)
    taken = events(queue.take_now()) if queue.pending else b""
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})
    opening = b"".join(_event(chunk) for chunk in rendering.opening())
    if opening or not taken:
        await _send(send, opening or _KEEPALIVE)
    try:
        while True:
            if taken:
                await _send(send, taken)
            if not await queue.wait(keepalive_seconds):
                await _send(send, _KEEPALIVE)
                taken = b""
                continue
            deltas = queue.take_now()
            if not deltas:
                break
            taken = events(deltas)
    except PenstockError as error:
        ending = _event(error_body(error, chat=chat)[1])
    else:
        ending = _event(rendering.last(closings_of(call))) if include_usage else b""
        if call.failure is not None:
            ending += _event(error_body(call.failure, chat=chat)[1])
    await _send(send, ending + _DONE, more=False)


def closings_of(call: Call) -> list[Closing]:
    """The closings of a call that is complete."""
    return [closing for closing in call.queue.closings if closing is not None]


def _event(chunk: dict[str, Any]) -> bytes:
    return b"data: " + _ENCODE(chunk).encode() + b"\n\n"


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
