"""``/v1/completions`` and ``/v1/chat/completions``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from penstock.common.errors import PenstockError, RequestTooLarge
from penstock.common.interceptors import bound_request_id
from penstock.common.logs import logger
from penstock.gateway.admission import Admission, Live
from penstock.gateway.auth import Keys
from penstock.gateway.http_door import generations
from penstock.gateway.http_door.body import answer_and_discard, read_body
from penstock.gateway.http_door.errors import error_response
from penstock.gateway.http_door.rendering import ChatRendering, CompletionRendering, Rendering
from penstock.gateway.http_door.schemas import ChatBody, CompletionBody, SharedBody, parse
from penstock.gateway.http_door.streaming import closings_of, collect, stream, while_connected
from penstock.gateway.request import Caller, Generation

__all__ = ["Door", "GenerateEndpoint", "chat_endpoint", "completions_endpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What all endpoints share."""

    admission: Admission
    keys: Keys
    max_body_bytes: int
    default_deadline_seconds: float
    keepalive_seconds: float

    def caller(self, headers: Headers) -> Caller:
        """The caller of a request, by its headers.

        Raises:
            Unauthenticated: keys are set up, and the request bears none of them.
        """
        return Caller(
            tenant=self.keys.tenant(headers.get("authorization")),
            request_id=bound_request_id(),
            deadline=time.monotonic() + self.default_deadline_seconds,
            traceparent=headers.get("traceparent", "")[:64],
        )


class GenerateEndpoint:
    """An ASGI application for one of the two; they differ in their bodies and in the shape of their answers."""

    def __init__(
        self,
        door: Door,
        body: type[SharedBody],
        to_generations: Callable[[Any], Sequence[Generation]],
        rendering: Callable[..., Rendering],
        id_prefix: str,
    ) -> None:
        self._door = door
        self._body = body
        self._to_generations = to_generations
        self._rendering = rendering
        self._id_prefix = id_prefix
        self._chat = body is ChatBody

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            caller = self._door.caller(headers)
            body = parse(self._body, await read_body(scope, receive, self._door.max_body_bytes))
            wanted = self._to_generations(body)
        except ClientDisconnect:
            return
        except RequestTooLarge as error:
            await answer_and_discard(error_response(error, chat=self._chat), receive, send)
            return
        except PenstockError as error:
            await error_response(error, chat=self._chat)(scope, receive, send)
            return
        await while_connected(self._answer(body, wanted, caller, scope, receive, send), receive)

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

    async def _relay(self, call: Live, body: SharedBody, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        rendering = self._rendering(call, self._id_prefix + caller.request_id, include_usage=include_usage)
        if body.stream:
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
            ]
            keepalive = self._door.keepalive_seconds
            await stream(call, rendering, send, headers, keepalive_seconds=keepalive, include_usage=include_usage, chat=self._chat)
            return
        deltas = await collect(call)
        told = json.dumps(rendering.whole(deltas, closings_of(call)), ensure_ascii=False, separators=(",", ":"))
        await Response(told, media_type="application/json")(scope, receive, send)


def completions_endpoint(door: Door) -> GenerateEndpoint:
    """``/v1/completions``."""
    return GenerateEndpoint(door, CompletionBody, generations.completions, CompletionRendering, "cmpl-")


def chat_endpoint(door: Door) -> GenerateEndpoint:
    """``/v1/chat/completions``."""
    return GenerateEndpoint(door, ChatBody, generations.chat, ChatRendering, "chatcmpl-")
