"""What is to be sent on one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Generic, TypeVar

from google.protobuf.message import Message

__all__ = ["Outbox"]

M = TypeVar("M", bound=Message)


class Outbox(Generic[M]):
    """One message that is filled; what gathers while it is on its way goes out in the next.

    Args:
        empty: makes a message that says nothing.
    """

    def __init__(self, empty: Callable[[], M]) -> None:
        self._empty = empty
        self.response = empty()
        self._ready = asyncio.Event()
        self._closed = False

    def flush(self) -> None:
        """Something was added to `response`."""
        self._ready.set()

    def close(self) -> None:
        """Nothing follows."""
        self._closed = True
        self._ready.set()

    async def __aiter__(self) -> AsyncIterator[M]:
        while True:
            if not self._closed:
                await self._ready.wait()
            self._ready.clear()
            response, self.response = self.response, self._empty()
            if response.ByteSize():
                yield response
            elif self._closed:
                return
