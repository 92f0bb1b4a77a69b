"""What changes in the prefix cache, for the scheduler: hashes that came and went since it was last told."""

from __future__ import annotations

import threading
from dataclasses import dataclass

__all__ = ["KvChanges", "KvLog"]


@dataclass(frozen=True, slots=True)
class KvChanges:
    """The net change since the last one, in no order within each list. `sequence` counts from 1 without gaps."""

    sequence: int
    stored: list[bytes]
    removed: list[bytes]
    cleared: bool = False


class KvLog:
    """Written by the engine's thread, read by any. What comes and goes between two readings is never told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._live: set[bytes] = set()
        self._stored: set[bytes] = set()
        self._removed: set[bytes] = set()
        self._cleared = False
        self._sequence = 0

    def stored(self, block: bytes) -> None:
        """A block can be found by this hash from now on."""
        with self._lock:
            self._live.add(block)
            if block in self._removed:
                self._removed.discard(block)
            else:
                self._stored.add(block)

    def removed(self, block: bytes) -> None:
        """It can not any more."""
        with self._lock:
            self._live.discard(block)
            if block in self._stored:
                self._stored.discard(block)
            else:
                self._removed.add(block)

    def cleared(self) -> None:
        """No block can be found any more."""
        with self._lock:
            self._live.clear()
            self._stored.clear()
            self._removed.clear()
            self._cleared = True

    def take(self) -> KvChanges | None:
        """What changed since the last taking; None where nothing did."""
        with self._lock:
            if not (self._stored or self._removed or self._cleared):
                return None
            return self._tell()

    def snapshot(self) -> KvChanges:
        """All that is cached now, for a reader that knows nothing; later takings go on from here, counting from 1 again."""
        with self._lock:
            self._sequence = 0
            self._stored, self._removed, self._cleared = set(self._live), set(), True
            return self._tell()

    def _tell(self) -> KvChanges:
        self._sequence += 1
        changes = KvChanges(self._sequence, list(self._stored), list(self._removed), self._cleared)
        self._stored, self._removed, self._cleared = set(), set(), False
        return changes
