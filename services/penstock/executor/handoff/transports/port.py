"""What a transport of KV is to the rest of the handoff: two ends of one link, and payload that stands for bytes.

A link belongs to one stream between two executors and ends with it. Its sending end puts bytes where the other can reach them and
has as much room as the receiving end has granted; its receiving end turns what it was told back into bytes, after it has checked
them. Both ends live in one event loop each and copy in threads beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import xxhash

from penstock.executor.handoff.ticket import Transport

__all__ = [
    "DevicePayload",
    "Incoming",
    "InlinePayload",
    "LinkClosed",
    "Outgoing",
    "Parcel",
    "Payload",
    "PayloadOutOfRange",
    "PayloadRefused",
    "PayloadTooLarge",
    "PayloadUnproven",
    "SharedPayload",
    "TransportFailed",
    "WrongChecksum",
    "checksum",
]


@dataclass(frozen=True, slots=True)
class InlinePayload:
    """The bytes themselves, to stand in the message. A sender's are the caller's own array, not a copy."""

    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class SharedPayload:
    """A range of the link's shared memory; offsets count from the first byte that payload may take."""

    offset: int
    bytes: int


@dataclass(frozen=True, slots=True)
class DevicePayload:
    """Memory that the receiving end fetches from where it lies; only the transport can read the descriptor."""

    descriptor: bytes


Payload = InlinePayload | SharedPayload | DevicePayload


@dataclass(frozen=True, slots=True)
class Parcel:
    """What is told of bytes that were put: where they are, and their `checksum`."""

    payload: Payload
    checksum: int


class LinkClosed(RuntimeError):
    """The link was closed: nothing can be put or opened any more."""


class PayloadTooLarge(ValueError):
    """More bytes than the link could ever have room for."""


class TransportFailed(RuntimeError):
    """The transport itself failed; another one may do."""


class PayloadRefused(ValueError):
    """Payload that was not opened. Nothing was read beyond what the link owns."""


class PayloadOutOfRange(PayloadRefused):
    """A range that is not within what the receiving end allocated."""


class PayloadUnproven(PayloadRefused):
    """Payload of another transport than the link's, or before it was proven that both ends share it."""


class WrongChecksum(PayloadRefused):
    """The bytes are not those that were put."""


class Outgoing(Protocol):
    """The sending end of a link."""

    @property
    def transport(self) -> Transport:
        """How its payload goes over."""

    async def put(self, data: memoryview) -> Parcel:
        """Wait for room, then put `data` where the receiving end can reach it.

        `data` is one-dimensional, contiguous, of unsigned bytes, and not written to before its payload is `taken` or the
        link closed. Cancelling gives the room back.

        Raises:
            PayloadTooLarge: it is larger than the whole window.
            LinkClosed: the link was closed, perhaps while this waited for room.
            TransportFailed: the transport could not do it.
        """

    def taken(self, payload: Payload) -> None:
        """The receiving end has done with it, or refused it: its room can be used again. A second call does nothing."""

    def close(self) -> None:
        """End the link: who waits for room gets `LinkClosed`. Idempotent; memory goes when the last copy into it has ended."""


class Incoming(Protocol):
    """The receiving end of a link."""

    @property
    def transport(self) -> Transport:
        """How its payload comes over."""

    async def open(self, payload: Payload, checksum: int) -> memoryview:
        """The bytes of a payload, read-only, checked for their range and then for their checksum.

        They stay readable until `Pushed` or `Refused` is told to the sender, which may then write over them, and after `close`.

        Raises:
            PayloadRefused: one of its kinds above.
            LinkClosed: the link was closed.
            TransportFailed: the transport could not fetch them.
        """

    def close(self) -> None:
        """End the link and give its memory back, once no view that was opened is left. Idempotent."""


def checksum(data: bytes | memoryview) -> int:
    """XXH3 of 64 bits over `data`. Releases the interpreter lock while it computes."""
    return int(xxhash.xxh3_64_intdigest(data))
