"""A connection of the HTTP door, bounded until a request has come so far that admission and the body's own bounds hold it.

uvicorn bounds no request's head with httptools: its parser gathers what comes, and a timer runs between requests alone.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import ClassVar, Literal

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from penstock.common.interceptors import REQUEST_ID_KEY, fit_request_id
from penstock.common.logs import logger
from penstock.gateway.http_door.body import DISCARD_SECONDS, DISCARDED_BYTES

__all__ = ["BoundedConnection", "ConnectionBounds", "bounded"]

# Each is an object of Python's, so that 64 KiB of the smallest would be megabytes. Servers commonly take 100 to 256.
_MOST_HEADERS = 256
# Reading is paused behind a request that waits for another, but one read may hold ten thousand of the smallest.
_MOST_PIPELINED = 128
_REQUEST_ID = REQUEST_ID_KEY.encode()
# What of a head tells how long the body is.
_FRAMING = frozenset({b"content-length", b"transfer-encoding"})


@dataclass(frozen=True, kw_only=True)
class ConnectionBounds:
    """What a connection may take before a request is whole enough to be admitted.

    Attributes:
        max_head_bytes: of a request line and its headers together.
        head_seconds: from a head's first byte to its last.
        max_http_connections: of all that are open at once.
    """

    max_head_bytes: int
    head_seconds: float
    max_http_connections: int


def bounded(bounds: ConnectionBounds) -> type[BoundedConnection]:
    """The protocol with these bounds; uvicorn makes one for each connection."""
    return type("BoundedConnection", (BoundedConnection,), {"bounds": bounds})


class _Refused(Exception):
    """Has the parser stop."""


class BoundedConnection(HttpToolsProtocol):
    """uvicorn's protocol, which is fed in pieces, so that a head is never held beyond its bound.

    A head that begins a piece is counted to the byte. One that begins behind another request in the same piece is counted from
    the next piece on, for the parser does not tell where it began: at most twice the bound is held of it. Of a body that comes in
    chunks, the lines between them and the trailers have the same bound.

    A refusal waits for the answers to earlier requests. Then what comes is thrown away for a while, since closing on unread data
    would tear the answer away from a client that sends before it reads. A request whose body can not be read is refused in place of
    its own answer; where that has begun, the connection ends without a word.

    No Upgrade is taken: a request that asks for one (Java's client does, for HTTP/2) is answered as if it did not.
    """

    bounds: ClassVar[ConnectionBounds]
    _place: Literal["between", "head", "body"] = "between"
    _gathered = 0  # bytes since something was told to the application
    _timer: asyncio.TimerHandle | None = None
    _running: RequestResponseCycle | None = None
    _cycle_before: RequestResponseCycle | None = None  # of the request before the newest
    _upgrade_asked = False  # by a head of which the parser has yet to read the body
    _refusal: bytes | None = None
    _discarded = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        super().connection_made(transport)
        if len(self.connections) > self.bounds.max_http_connections:
            self._refuse(HTTPStatus.TOO_MANY_REQUESTS, "overloaded", "as many connections are open as are taken; try again")
            transport.close()
            return
        # Before its first request a connection is idle as it is between two.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        running = self._running
        if running is not None and not running.response_complete:  # uvicorn tells the newest alone, which may wait behind it
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        while data and self._refusal is None and not self.transport.is_closing():
            if self._place == "between" and not (data := data.lstrip(b"\r\n")):
                return  # empty lines before a request mean nothing: the connection stays as idle as it was
            room = self.bounds.max_head_bytes - self._gathered
            piece, data = data[:room], data[room:]
            self._gathered += len(piece)
            self._parse(piece)
            if self._gathered >= self.bounds.max_head_bytes and self._place == "body":
                self._break_off(f"what stands between or behind the body's chunks has more than {self.bounds.max_head_bytes} bytes")
            elif self._gathered >= self.bounds.max_head_bytes:
                self._refuse_head(f"the request line and headers have more than {self.bounds.max_head_bytes} bytes")
        if self._refusal is not None:
            self._discarded += len(data)
            if self._discarded > DISCARDED_BYTES:
                self.transport.abort()
        elif self._place == "head" and self._timer is None and not self.transport.is_closing():
            self._arm(self.bounds.head_seconds)

    def _parse(self, piece: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            while piece:
                piece = self._parse_to_upgrade(piece)
        except httptools.HttpParserError:
            if self._place == "body":
                self._break_off("the body can not be read: its length or its chunks are not as HTTP/1.1 has them")
            else:
                self._refuse(HTTPStatus.BAD_REQUEST, "invalid_request", "this is no HTTP/1.1 request that can be read")

    def _parse_to_upgrade(self, piece: bytes) -> bytes:
        """What is left behind a head that asks for an upgrade."""
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            self._read_body_all_the_same()
            return piece[upgrade.args[0] :]
        return b""

    def _read_body_all_the_same(self) -> None:
        """Have a new parser take what follows by the head's length or chunks; the first takes it for another protocol."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
        framing = [name + b": " + value for name, value in self.headers if name in _FRAMING]
        ending = [] if self.cycle.keep_alive else [b"connection: close"]
        self.parser.feed_data(b"\r\n".join([b"POST / HTTP/1.1", *framing, *ending, b"", b""]))

    def on_message_begin(self) -> None:
        if self._upgrade_asked:
            return
        self._place = "head"
        super().on_message_begin()
        if len(self.pipeline) >= _MOST_PIPELINED:
            self._refuse(HTTPStatus.TOO_MANY_REQUESTS, "overloaded", f"at most {_MOST_PIPELINED} requests wait on a connection")
            raise _Refused

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._place == "body":
            return  # a trailer, which would stand among the headers; or of the head without an upgrade
        if len(self.headers) >= _MOST_HEADERS:
            self._refuse_head(f"at most {_MOST_HEADERS} headers are taken")
            raise _Refused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._upgrade_asked:
            self._upgrade_asked = False
            return
        if not any(name == _REQUEST_ID for name, _ in self.headers):
            # Drawn here, so that a refusal of its body bears the id that the application's log has.
            self.headers.append((_REQUEST_ID, fit_request_id(None).encode()))
        before = self.cycle
        super().on_headers_complete()  # raises where the target is none; then it is a head that is refused
        self._cycle_before = before
        self._place, self._gathered = "body", 0
        self._upgrade_asked = self.parser.should_upgrade()
        self._disarm()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._gathered = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._upgrade_asked:
            return
        self._place, self._gathered = "between", 0
        self._disarm()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._refusal is not None:
            self._answer_if_idle(self._refusal)
        elif self._place == "head":
            self._arm(self.bounds.head_seconds)
        elif self._place == "body" and self.cycle.response_complete:
            self._arm(DISCARD_SECONDS)  # for the rest of a body that nobody reads

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._timer = self.loop.call_later(seconds, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._place == "head" and self.flow.read_paused:
            return  # the rest may wait on this side; its time begins again with the answer that it waits for
        if self._place == "head":
            why = f"the request line and headers did not come within {self.bounds.head_seconds:g} seconds"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, "request_head_timeout", why)
        else:
            self.transport.abort()

    def _refuse_head(self, why: str) -> None:
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "request_head_too_large", why)

    def _refuse(self, status: HTTPStatus, code: str, why: str) -> None:
        request_id = self._request_id()
        answer = _response(status, code, why, [*self.server_state.default_headers, (_REQUEST_ID, request_id.encode())])
        self._end(answer, status=int(status), why=why, request_id=request_id)

    def _break_off(self, why: str) -> None:
        """Refuse the newest request, which the application has by now, or is about to."""
        if self._refusal is not None:
            return  # that is what stopped the parser
        broken, self.cycle = self.cycle, self._cycle_before  # type: ignore[assignment]  # None before the first request
        if self.pipeline and self.pipeline[0][0] is broken:
            self.pipeline.popleft()
        broken.disconnected = True  # the application reads no more of it, and whatever it still sends goes nowhere
        broken.waiting_for_100_continue = False
        broken.message_event.set()
        if broken.response_started:
            self._end(b"", why=why, request_id=self._request_id())
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, "invalid_request", why)

    def _request_id(self) -> str:
        headers = () if self._place == "between" else self.headers
        return fit_request_id(next((value for name, value in headers if name == _REQUEST_ID), None))

    def _end(self, answer: bytes, **facts: object) -> None:
        """Write this, which may be nothing, behind the answers to earlier requests, and end."""
        if self._refusal is not None or self.transport.is_closing():
            return  # the parser may have stopped where the bytes come to their bound, too
        self._disarm()
        logger().info("connection refused", door="http", peer=":".join(map(str, self.client or ())), **facts)
        self._refusal = answer
        self._answer_if_idle(answer)

    def _answer_if_idle(self, refusal: bytes) -> None:
        if self.cycle is None or self.cycle.response_complete:  # type: ignore[redundant-expr]  # None before the first request
            self._unset_keepalive_if_required()
            self.flow.resume_reading()  # a body that was held up is thrown away
            self.transport.write(refusal)
            self.transport.write_eof()
            self._timer = self.loop.call_later(DISCARD_SECONDS, self.transport.abort)


def _response(status: HTTPStatus, code: str, why: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    kind, headers = "invalid_request_error", [*headers, (b"content-type", b"application/json"), (b"connection", b"close")]
    if status is HTTPStatus.TOO_MANY_REQUESTS:
        kind, headers = "rate_limit_error", [*headers, (b"retry-after", b"1")]
    body = json.dumps({"error": {"message": why, "type": kind, "param": None, "code": code}}).encode()
    headers.append((b"content-length", b"%d" % len(body)))
    line = f"HTTP/1.1 {status.value} {status.phrase}".encode()
    return b"\r\n".join([line, *(name + b": " + value for name, value in headers), b"", body])
