"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from penstock.common.errors import PenstockError
from penstock.common.interceptors import bound_request_id
from penstock.common.logs import logger
from penstock.common.tracing import TRACEPARENT_KEY, traceparent_of
from penstock.gateway.admission import Admission, Call
from penstock.gateway.auth import Keys
from penstock.gateway.http_door import generations
from penstock.gateway.http_door.body import read_body
from penstock.gateway.http_door.errors import error_response
from penstock.gateway.http_door.rendering import ChatRendering, CompletionRendering, Rendering
from penstock.gateway.http_door.schemas import ChatBody, CompletionBody, SharedBody, StreamOptions, parse
from penstock.gateway.http_door.streaming import closings_of, collect, stream, while_connected
from penstock.gateway.output import OutputQueue
from penstock.gateway.request import Caller, Generation

__all__ = ["Door", "GenerateEndpoint", "chat_endpoint", "completions_endpoint"]


B = TypeVar("B", bound=BaseModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What all endpoints share."""

    admission: Admission
    keys: Keys
    max_body_bytes: int
    body_seconds: float
    default_deadline_seconds: float
    keepalive_seconds: float

    def caller(self, headers: Headers) -> Caller:
        """The caller of a request, by its headers.

        Raises:
            Unauthenticated: keys are set up, and the request bears none of them.
        """
        now = time.monotonic()
        return Caller(
            tenant=self.keys.tenant(headers.get("authorization")),
            request_id=bound_request_id(),
            deadline=now + self.default_deadline_seconds,
            arrived=now,
            traceparent=traceparent_of(headers.get(TRACEPARENT_KEY)),
        )

    async def read(self, kind: type[B], scope: Scope, receive: Receive) -> B:
        """The body of a counted call, checked.

        Raises:
            PenstockError: it is too large or wrong, or does not come in time.
            ClientDisconnect: the client left.
        """
        body = await read_body(scope, receive, self.max_body_bytes, self.body_seconds)
        return parse(kind, body, self.admission.bounds)


class GenerateEndpoint:
    """An ASGI application for one of the two; they differ in their bodies and in the shape of their answers."""

    def __init__(
        self,
        door: Door,
        body: type[SharedBody],
        to_generations: Callable[[Any], Sequence[Generation]],
        rendering: Callable[[Call, str, StreamOptions], Rendering],
        id_prefix: str,
    ) -> None:
        self._door = door
        self._body = body
        self._to_generations = to_generations
        self._rendering = rendering
        self._id_prefix = id_prefix
        self._chat = body is ChatBody

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            caller = self._door.caller(Headers(scope=scope))
            with self._door.admission.counted():
                body = await self._door.read(self._body, scope, receive)
                wanted = self._to_generations(body)
                await while_connected(self._answer(body, wanted, caller, scope, receive, send), receive)
        except ClientDisconnect:
            return
        except PenstockError as error:  # before there was an answer
            await error_response(error, chat=self._chat)(scope, receive, send)

    async def _answer(
        self, body: SharedBody, wanted: Sequence[Generation], caller: Caller, scope: Scope, receive: Receive, send: Send
    ) -> None:
        began = False

        async def begin(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            async with self._door.admission.admit(wanted, caller) as call:
                await self._relay(call, body, caller, scope, receive, begin)
        except OSError:
            return  # the client is gone
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets a status or sees an end
            if not isinstance(error, PenstockError):
                logger().error("request failed", exc_info=error)
            if not began:  # otherwise the connection is closed in the middle, which the client can not take for an end
                await error_response(error, chat=self._chat)(scope, receive, send)

    async def _relay(self, call: Call, body: SharedBody, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        options = body.stream_options or StreamOptions()
        send = _watched(send, call.queue)
        rendering = self._rendering(call, self._id_prefix + caller.request_id, options)
        if body.stream:
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            await stream(
                *(call, rendering, send, headers),
                keepalive_seconds=self._door.keepalive_seconds,
                include_usage=bool(options.include_usage),
                chat=self._chat,
            )
            return
        deltas = await collect(call)
        answer = json.dumps(rendering.whole(deltas, closings_of(call)), ensure_ascii=False, separators=(",", ":"))
        await Response(answer, media_type="application/json")(scope, receive, send)


def _watched(send: Send, queue: OutputQueue) -> Send:
    """A client that stops to read holds up a write: so long is counted too."""

    async def watched(message: Message) -> None:
        queue.write_begins()
        await send(message)
        queue.write_ended()

    return watched


def completions_endpoint(door: Door) -> GenerateEndpoint:
    """``/v1/completions``."""
    return GenerateEndpoint(door, CompletionBody, generations.completions, CompletionRendering, "cmpl-")


def chat_endpoint(door: Door) -> GenerateEndpoint:
    """``/v1/chat/completions``."""
    return GenerateEndpoint(door, ChatBody, generations.chat, ChatRendering, "chatcmpl-")
