"""One HTTP/1.1 request and the parts of its answer as they come: asyncio's streams and httptools, and no client library beside."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import httptools

__all__ = ["Door", "HttpError", "request"]

_READ_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Door:
    """Where requests go: HOST:PORT, whether it speaks TLS, and the key that it knows the caller by."""

    address: str
    tls: bool = False
    api_key: str | None = None


class HttpError(Exception):
    """The server refused, or did not speak HTTP. `status` is that of a refusal."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _Answer:
    """Callbacks of the parser: body parts that wait to be yielded, and whether the answer is complete."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self.complete = False

    def on_body(self, part: bytes) -> None:
        self.parts.append(part)

    def on_message_complete(self) -> None:
        self.complete = True

    def take(self) -> list[bytes]:
        parts, self.parts = self.parts, []
        return parts


async def request(door: Door, method: str, path: str, body: Mapping[str, Any] | None = None) -> AsyncIterator[bytes]:
    """Send one request and yield its answer's body, part by part.

    Raises:
        HttpError: the status is not 200, or the connection closed before the answer was complete.
        OSError: there is no connection, or its certificate is not trusted.
    """
    host, _, port = door.address.rpartition(":")
    tls = ssl.create_default_context() if door.tls else None
    reader, writer = await asyncio.open_connection(host.strip("[]"), int(port), ssl=tls)
    try:
        writer.write(_encoded(door, method, path, body))
        answer = _Answer()
        parser = httptools.HttpResponseParser(answer)
        refused: list[bytes] = []
        while not answer.complete:
            read = await reader.read(_READ_BYTES)
            if not read:
                raise HttpError("the connection closed before the answer was complete")
            _feed(parser, read)
            for part in answer.take():
                if parser.get_status_code() != HTTPStatus.OK:
                    refused.append(part)
                else:
                    yield part
        status = parser.get_status_code()
        if status != HTTPStatus.OK:
            raise HttpError(f"HTTP {status}: {b''.join(refused)[:500].decode(errors='replace')}", status)
    finally:
        writer.close()


def _feed(parser: httptools.HttpResponseParser, read: bytes) -> None:
    try:
        parser.feed_data(read)
    except httptools.HttpParserError as error:
        raise HttpError(f"not HTTP: {error}") from error


def _encoded(door: Door, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    head = [f"{method} {path} HTTP/1.1", f"Host: {door.address}", f"Content-Length: {len(content)}", "Connection: close"]
    if door.api_key is not None:
        head.append(f"Authorization: Bearer {door.api_key}")
    if body is not None:
        head.append("Content-Type: application/json")
    return "\r\n".join([*head, "", ""]).encode() + content
