"""The room that a link's payload may take at a time, and waiting for it in the order of asking."""

from __future__ import annotations

import asyncio
from collections import deque

from penstock.executor.handoff.transports.port import LinkClosed, Payload, PayloadTooLarge
from penstock.executor.handoff.transports.ranges import Ranges

__all__ = ["Window"]


class Window:
    """Ranges of `size` bytes, given to who asked first. Of one event loop."""

    def __init__(self, size: int) -> None:
        self._ranges = Ranges(size)
        self._waiting: deque[tuple[int, asyncio.Future[int]]] = deque()
        # By identity: a second `taken` must not free what another payload has taken at the same place meanwhile.
        self._payloads: dict[int, tuple[Payload, int]] = {}
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    async def take(self, size: int) -> int:
        """Wait for a range of `size` bytes: its begin.

        Raises:
            PayloadTooLarge: there never will be one.
            LinkClosed: the window was closed.
        """
        if not 1 <= size <= self._ranges.size:
            raise PayloadTooLarge(f"{size} bytes: a payload holds 1 to {self._ranges.size}, the link's window")
        if self._closed:
            raise LinkClosed("the link is closed")
        if not self._waiting and (begin := self._ranges.take(size)) is not None:
            return begin
        granted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, granted))
        try:
            return await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                self.give(granted.result())  # granted and cancelled in the same turn
            self._grant()
            raise

    def give(self, begin: int) -> None:
        """A range can be taken again."""
        self._ranges.give(begin)
        self._grant()

    def hold(self, payload: Payload, begin: int) -> None:
        """Until `release`, this payload has the range at `begin`."""
        self._payloads[id(payload)] = (payload, begin)

    def release(self, payload: Payload) -> None:
        """Give the payload's range back, if it still has one."""
        if (held := self._payloads.pop(id(payload), None)) is not None:
            self.give(held[1])

    def close(self) -> None:
        """Who waits gets `LinkClosed`."""
        self._closed = True
        while self._waiting:
            _, granted = self._waiting.popleft()
            if not granted.done():
                granted.set_exception(LinkClosed("the link was closed"))

    def _grant(self) -> None:
        while self._waiting:
            size, granted = self._waiting[0]
            if not granted.done():
                if (begin := self._ranges.take(size)) is None:
                    return
                granted.set_result(begin)
            self._waiting.popleft()
