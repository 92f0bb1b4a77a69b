"""From the engine's thread to an event loop, without giving Python's lock away on the way."""

from __future__ import annotations

import asyncio
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable

__all__ = ["Bell"]

# Called with the lock held, as `os.write` and sockets are not: see `Bell`.
_write = ctypes.PyDLL(None).write
_write.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t)
_write.restype = ctypes.c_ssize_t

_PENDING_BYTES = 64


class Bell:
    """Calls functions in the running event loop, asked from any thread: `call_soon_threadsafe` for a thread that is in a hurry.

    That one gives Python's lock away while it writes to the loop's socket. The loop's thread takes it, and keeps it until it has
    done all that the call led to, while the engine's next step waits. Here the caller keeps the lock, and the loop gets it as soon
    as the caller waits or computes without it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._calls: deque[Callable[[], object]] = deque()
        self._rung = False
        self._open = threading.Lock()
        self._reader, self._writer = os.pipe()
        for end in (self._reader, self._writer):
            os.set_blocking(end, False)
        self._loop.add_reader(self._reader, self._answer)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function, which does not raise, in the loop after those asked for before. Once the bell is closed, nothing."""
        if self._writer < 0:
            return
        self._calls.append(function)
        if not self._rung:
            self._rung = True
            with self._open:  # nobody closes it between the two, and the number becomes another file's
                if self._writer >= 0:
                    _write(self._writer, b"\0", 1)

    def close(self) -> None:
        """Forget what was not called yet. In the loop's thread. Idempotent."""
        with self._open:
            if self._writer < 0:
                return
            os.close(self._writer)
            self._writer = -1
        self._loop.remove_reader(self._reader)
        os.close(self._reader)
        self._calls.clear()

    def _answer(self) -> None:
        os.read(self._reader, _PENDING_BYTES)
        self._rung = False  # before they are called: one that is asked for meanwhile rings again
        while self._calls:
            self._calls.popleft()()
