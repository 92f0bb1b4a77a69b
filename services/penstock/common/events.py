"""The event log: a line of JSON for everything that happens to a request, for whoever wants to know later.

Each line has ``time`` (seconds of the monotonic clock, the same for all processes of a machine), ``pid`` and ``event``. The first
of a process is ``opened``, with the time of the day. What could not be written because too much was waiting is counted by a line
``dropped``.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from penstock.common.logs import logger
from penstock.common.service import StartError

__all__ = ["EventLog"]

_MOST_WAITING = 1 << 16
_PAUSE_SECONDS = 0.02


class _Event(NamedTuple):
    time: float
    event: str
    facts: Mapping[str, Any]


class EventLog:
    """Appends to a file, from a thread of its own. Telling costs an append to a queue; nothing is formatted there.

    Args:
        path: the file; several processes may append to it.
        service: who tells.
        most_waiting: events that may wait for the disk; more are dropped, and counted.

    Raises:
        StartError: the file can not be written.
    """

    def __init__(self, path: Path, service: str, *, most_waiting: int = _MOST_WAITING) -> None:
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StartError(f"event_log: {path}: {error.strerror}") from error
        self._waiting: deque[_Event] = deque()
        self._most = most_waiting
        self._dropped = self._dropped_told = 0
        self._pending = threading.Event()
        self._closing = False
        self.tell("opened", {"service": service, "at": datetime.now(UTC).isoformat()})
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()

    def tell(self, event: str, facts: Mapping[str, Any]) -> None:
        """Something has happened now. `facts` are what JSON holds, and are not changed afterwards."""
        if len(self._waiting) >= self._most:
            self._dropped += 1
            return
        self._waiting.append(_Event(time.monotonic(), event, facts))
        if not self._pending.is_set():
            self._pending.set()

    def close(self) -> None:
        """Write what waits, and close the file. Idempotent."""
        self._closing = True
        self._pending.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._closing:
                self._pending.wait()
                self._pending.clear()
                self._write()
                if not self._closing:
                    time.sleep(_PAUSE_SECONDS)  # what comes meanwhile is one write
            self._write()
        except OSError as error:
            self._most = 0  # whoever tells goes on
            logger().error("the event log can not be written", exc_info=error)
        finally:
            os.close(self._file)

    def _write(self) -> None:
        lines = "".join(f"{line}\n" for line in self._lines())
        data = memoryview(lines.encode())
        while data:
            data = data[os.write(self._file, data) :]

    def _lines(self) -> Iterator[str]:
        pid = os.getpid()
        while self._waiting:
            event = self._waiting.popleft()
            yield json.dumps({"time": round(event.time, 6), "pid": pid, "event": event.event, **event.facts})
        if dropped := self._dropped - self._dropped_told:
            self._dropped_told += dropped
            yield json.dumps({"time": round(time.monotonic(), 6), "pid": pid, "event": "dropped", "count": dropped})
