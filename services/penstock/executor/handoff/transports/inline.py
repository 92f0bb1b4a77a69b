"""Payload in gRPC's own messages: what two executors always share."""

from __future__ import annotations

import asyncio

from penstock.common.heap import keep_freed_memory
from penstock.executor.handoff.ticket import Transport
from penstock.executor.handoff.transports.port import (
    InlinePayload,
    LinkClosed,
    Parcel,
    Payload,
    PayloadUnproven,
    WrongChecksum,
    checksum,
)
from penstock.executor.handoff.transports.window import Window

__all__ = ["InlineIncoming", "InlineOutgoing"]


class InlineOutgoing:
    """The sending end. Nothing is copied here: the message takes the bytes from the caller's array."""

    transport = Transport.GRPC

    def __init__(self, window_bytes: int) -> None:
        self._window = Window(window_bytes)

    async def put(self, data: memoryview) -> Parcel:
        """See `Outgoing`."""
        begin = await self._window.take(data.nbytes)
        try:
            parcel = Parcel(InlinePayload(data), await asyncio.to_thread(checksum, data))
        except BaseException:
            self._window.give(begin)
            raise
        self._window.hold(parcel.payload, begin)
        return parcel

    def taken(self, payload: Payload) -> None:
        """See `Outgoing`."""
        self._window.release(payload)

    def close(self) -> None:
        """See `Outgoing`."""
        self._window.close()


class InlineIncoming:
    """The receiving end."""

    transport = Transport.GRPC

    def __init__(self) -> None:
        self._closed = False

    async def open(self, payload: Payload, checksum: int) -> memoryview:
        """See `Incoming`."""
        if self._closed:
            raise LinkClosed("the link is closed")
        if not isinstance(payload, InlinePayload):
            raise PayloadUnproven("the payload is not in the message")
        keep_freed_memory()
        view = memoryview(payload.data).toreadonly()
        await check(view, checksum)
        return view

    def close(self) -> None:
        """See `Incoming`."""
        self._closed = True


async def check(data: memoryview, expected: int) -> None:
    """Compute the checksum beside the event loop.

    Raises:
        WrongChecksum: it is another one.
    """
    if await asyncio.to_thread(checksum, data) != expected:
        raise WrongChecksum(f"{data.nbytes} bytes are not those that were sent: their checksum differs")
