"""Messages of the Handoff stream with payload in them, written and read without copies of it that are not needed.

A message goes over the wire as protobuf writes it: `Push.inline` has the highest number of what an inline Push holds, so it stands
last, and Push is all that its `HandoffRequest` holds. protobuf would copy the payload into a message, and from there into
the bytes that are sent; here it is joined to them once. On the way in it is a view of the bytes that came. What does not lie so is
left to protobuf, which reads any order of fields.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from penstock.internal.v1 import handoff_pb2 as pb

__all__ = ["Request", "deserialize", "open_stream", "serialize", "serve_stream"]

_SERVICE, _METHOD = "penstock.internal.v1.HandoffService", "Handoff"
_PUSH = bytes([pb.HandoffRequest.PUSH_FIELD_NUMBER << 3 | 2])
_INLINE = bytes([pb.Push.INLINE_FIELD_NUMBER << 3 | 2])
# Below it, protobuf is as fast.
_LEAST_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Request:
    """A message of the prefill side; `inline` is its Push's payload where that stands in it, and not in `message`."""

    message: pb.HandoffRequest
    inline: bytes | memoryview | None = None


def open_stream(channel: grpc.aio.Channel) -> Any:
    """Call `Handoff`: a stream of `Request` and of `pb.HandoffResponse`."""
    method = channel.stream_stream(
        f"/{_SERVICE}/{_METHOD}", request_serializer=serialize, response_deserializer=pb.HandoffResponse.FromString
    )
    return method()


def serve_stream(servicer: Any, server: grpc.aio.Server) -> None:
    """Register a servicer whose `Handoff` takes a stream of `Request`; otherwise as the generated function does."""
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.Handoff, request_deserializer=deserialize, response_serializer=pb.HandoffResponse.SerializeToString
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler}),))


def serialize(request: Request) -> bytes:
    """The bytes of a message, its payload copied once."""
    message, payload = request.message, request.inline
    if payload is None:
        return message.SerializeToString()
    size = memoryview(payload).nbytes
    head = message.push.SerializeToString() + _INLINE + _varint(size)
    return b"".join((_PUSH, _varint(len(head) + size), head, payload))


def deserialize(data: bytes) -> Request:
    """The message of these bytes, its payload not copied.

    Raises:
        google.protobuf.message.DecodeError: they are none.
    """
    found = _find_inline(data) if len(data) >= _LEAST_BYTES and data[:1] == _PUSH else None
    if found is None:
        return Request(pb.HandoffRequest.FromString(data))
    push, head_end, payload = found
    return Request(pb.HandoffRequest(push=pb.Push.FromString(data[push:head_end])), memoryview(data)[payload:])


def _find_inline(data: bytes) -> tuple[int, int, int] | None:
    """Where the Push begins, where its fields before the payload end, and where the payload begins, if it ends with the data."""
    try:
        size, push = _read_varint(data, 1)
        if push + size != len(data):
            return None
        at = push
        while True:
            tag, behind = _read_varint(data, at)
            if data[at:behind] == _INLINE:
                size, payload = _read_varint(data, behind)
                return (push, at, payload) if size and payload + size == len(data) else None
            at = _SKIP[tag & 7](data, behind)
    except (IndexError, KeyError, ValueError):
        return None  # protobuf says what is wrong with it


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 64, 7):
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("a varint has ten bytes at most")


def _skip_bytes(data: bytes, at: int) -> int:
    size, at = _read_varint(data, at)
    return at + size


# By wire type: where a field's value ends.
_SKIP: dict[int, Callable[[bytes, int], int]] = {
    0: lambda data, at: _read_varint(data, at)[1],
    1: lambda _, at: at + 8,
    2: _skip_bytes,
    5: lambda _, at: at + 4,
}
