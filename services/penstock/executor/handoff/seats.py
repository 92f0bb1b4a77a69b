"""Who may have a stream to this executor: a few that have not said who they are, and each executor one."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator

from penstock.common.errors import DeadlineExceeded, Overloaded

__all__ = ["Seats"]

_MOST_STRANGERS = 256
_PATIENCE_SECONDS = 10.0


class Seats:
    """Of one event loop."""

    def __init__(self) -> None:
        self._strangers = 0
        self._newest: dict[str, asyncio.Event] = {}
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    @contextlib.asynccontextmanager
    async def stranger(self) -> AsyncIterator[None]:
        """While a stream has not said whose it is.

        Raises:
            Overloaded: too many such streams.
            DeadlineExceeded: it has taken too long.
        """
        if self._strangers >= _MOST_STRANGERS:
            raise Overloaded("too many streams have not introduced themselves", retry_after=1.0)
        self._strangers += 1
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                yield
        except TimeoutError:
            raise DeadlineExceeded("a stream begins with Introduce, at once") from None
        finally:
            self._strangers -= 1

    @contextlib.asynccontextmanager
    async def of(self, executor_id: str) -> AsyncIterator[asyncio.Event]:
        """From the end of the executor's older stream on, whose memory has been given back then.

        Yields:
            What is set when a newer stream of the executor waits: this one is to end.
        """
        newer = asyncio.Event()
        older = self._newest.get(executor_id)
        self._newest[executor_id] = newer
        if older is not None:
            older.set()
        lock = self._locks.setdefault(executor_id, asyncio.Lock())
        try:
            async with lock:
                yield newer
        finally:
            if self._newest.get(executor_id) is newer:
                del self._newest[executor_id]
