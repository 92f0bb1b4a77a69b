"""The event log: a line of JSON for everything that happens to a request, for whoever wants to know later.

Each line has ``time`` (seconds of the monotonic clock, the same for all processes of a machine), ``pid`` and ``event``. The first
of a process is ``opened``, with the time of the day. What could not be written, because too much was waiting or the disk was full,
is counted by a line ``dropped``.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
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
        self._dropped = self._lost = self._dropped_told = 0  # by whoever tells; by the disk; of both
        self._pending = threading.Event()
        self._closing = False
        self._failing = False
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
        finally:
            os.close(self._file)

    def _write(self) -> None:
        """All that waits. What the disk does not take is dropped, and who tells goes on."""
        events = [self._waiting.popleft() for _ in range(len(self._waiting))]
        dropped = self._dropped + self._lost - self._dropped_told
        lines = [_line(event) for event in events]
        if dropped:
            lines.insert(0, _line(_Event(time.monotonic(), "dropped", {"count": dropped})))
        # Where writing failed, a line may be torn: the next one does not stand behind it.
        data = memoryview(("\n" * self._failing + "".join(f"{line}\n" for line in lines)).encode())
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self._lost += min(len(events), bytes(data).count(b"\n"))
            if not self._failing:
                logger().error("the event log can not be written: events are dropped until it can", why=error.strerror)
            self._failing = True
        else:
            self._dropped_told += dropped
            self._failing = False


def _line(event: _Event) -> str:
    return json.dumps({"time": round(event.time, 6), "pid": os.getpid(), "event": event.event, **event.facts})
