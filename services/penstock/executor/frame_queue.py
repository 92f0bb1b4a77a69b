"""From the engine's thread to the event loop of its service."""

from __future__ import annotations

import asyncio
from collections import deque

from penstock.executor.bell import Bell
from penstock.executor.sequence import Frame

__all__ = ["FrameQueue"]


class FrameQueue:
    """Frames on their way from the engine's thread to one gateway's stream.

    Frames that wait for a slow gateway are sent as one message. When more wait than the bound allows, `overflowed` is set, and no
    more are kept.
    """

    def __init__(self, bell: Bell, most_waiting: int) -> None:
        self._bell = bell
        self._frames: deque[Frame] = deque()
        self._filled = asyncio.Event()
        self.overflowed = asyncio.Event()
        self._most = most_waiting
        self._waking = False
        self._full = False
        self._ended = False

    def put(self, frame: Frame) -> None:
        """Add a frame, from any thread: the sink of the stream's sequences."""
        if self._full:
            return
        if len(self._frames) >= self._most:
            self._full = True
            self._bell.call(self.overflowed.set)
            return
        self._frames.append(frame)
        if not self._waking:
            self._waking = True
            self._bell.call(self._filled.set)

    def end(self) -> None:
        """Let `take` give an empty list once all frames are taken. In the loop's thread."""
        self._ended = True
        self._filled.set()

    async def take(self) -> list[Frame]:
        """All frames that wait, as soon as there are any; none at the end."""
        while not self._frames and not self._ended:
            await self._filled.wait()
            self._filled.clear()
            self._waking = False  # before the frames are taken: one that comes in between wakes the loop again
        return [self._frames.popleft() for _ in range(len(self._frames))]
