"""Payload through memory that both executors have mapped: one copy in, and the receiving side imports from where it lies.

The receiving end owns the memory and the sending end decides which range each payload takes. What is opened is checked for its
range first and for its checksum then, and is imported without another copy. A sending executor that changes the bytes in between
brings wrong KV into its own sequence, which it could have sent with a right checksum; the bytes are numbers, and nothing that
reads them follows them anywhere.
"""

from __future__ import annotations

import asyncio
import hmac

import numpy as np
import xxhash

from penstock.executor.handoff.ticket import Transport
from penstock.executor.handoff.transports import segments
from penstock.executor.handoff.transports.inline import check
from penstock.executor.handoff.transports.port import (
    LinkClosed,
    Parcel,
    Payload,
    PayloadOutOfRange,
    PayloadUnproven,
    SharedPayload,
)
from penstock.executor.handoff.transports.window import Window

__all__ = ["SharedIncoming", "SharedOutgoing", "copy_with_checksum"]

_PIECE_BYTES = 256 << 10


class SharedOutgoing:
    """The sending end of a segment that was attached."""

    transport = Transport.SHARED_MEMORY

    def __init__(self, segment: segments.Segment) -> None:
        self._segment = segment
        self._memory: memoryview | None = segment.payload
        self._window = Window(self._memory.nbytes)

    @property
    def answer(self) -> bytes:
        """What the receiving end takes as the proof that this one has mapped its segment."""
        return self._segment.answer

    async def put(self, data: memoryview) -> Parcel:
        """See `Outgoing`."""
        begin = await self._window.take(data.nbytes)
        if self._memory is None:
            raise LinkClosed("the link was closed")
        range_ = self._memory[begin : begin + data.nbytes]
        copying = asyncio.get_running_loop().run_in_executor(None, copy_with_checksum, range_, data)
        try:
            sum_ = await asyncio.shield(copying)
        except asyncio.CancelledError:
            copying.add_done_callback(lambda _: self._window.give(begin))  # nobody else may write there before
            raise
        parcel = Parcel(SharedPayload(begin, data.nbytes), sum_)
        self._window.hold(parcel.payload, begin)
        return parcel

    def taken(self, payload: Payload) -> None:
        """See `Outgoing`."""
        self._window.release(payload)

    def close(self) -> None:
        """See `Outgoing`."""
        self._memory = None
        self._window.close()
        self._segment.close()
        segments.sweep()  # the other end may have been killed before it took the name away


class SharedIncoming:
    """The receiving end: the segment's owner."""

    transport = Transport.SHARED_MEMORY

    def __init__(self, window_bytes: int) -> None:
        """Make the segment.

        Raises:
            OSError: it can not be made here.
        """
        self._segment, self.offer = segments.create(window_bytes)
        self._answer = self._segment.answer
        self._memory: memoryview | None = self._segment.payload.toreadonly()
        self._proven = False

    def prove(self, answer: bytes) -> bool:
        """Whether the other end has read the segment; from then on payload may come through it, and its name is gone."""
        self._segment.unlink()
        self._proven = self._proven or hmac.compare_digest(answer, self._answer)
        return self._proven

    async def open(self, payload: Payload, checksum: int) -> memoryview:
        """See `Incoming`."""
        if self._memory is None:
            raise LinkClosed("the link is closed")
        if not isinstance(payload, SharedPayload) or not self._proven:
            raise PayloadUnproven("shared memory was not proven on this stream")
        if payload.offset < 0 or payload.bytes < 1 or payload.offset + payload.bytes > self._memory.nbytes:
            raise PayloadOutOfRange(
                f"bytes {payload.offset} to {payload.offset + payload.bytes}: the segment has 0 to {self._memory.nbytes}"
            )
        view = self._memory[payload.offset : payload.offset + payload.bytes]
        await check(view, checksum)
        return view

    def close(self) -> None:
        """See `Incoming`."""
        self._memory = None
        self._segment.unlink()
        self._segment.close()


def copy_with_checksum(target: memoryview, source: memoryview) -> int:
    """Copy bytes piece by piece, and take the checksum of each piece while it is in the processor's cache; the checksum of all."""
    # numpy copies without the interpreter lock; slices of memoryviews do not. The checksum is of what was meant to be copied.
    to, of = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    sum_ = xxhash.xxh3_64()
    for begin in range(0, of.size, _PIECE_BYTES):
        piece = of[begin : begin + _PIECE_BYTES]
        np.copyto(to[begin : begin + _PIECE_BYTES], piece)
        sum_.update(piece.data)
    return sum_.intdigest()
