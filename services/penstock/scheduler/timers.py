"""Many timers, each set and cleared in O(1): a hashed wheel (Varghese and Lauck, 1987) whose ticks stand in a heap."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["TICK_SECONDS", "Timers"]

# A timer is late by less than this, and never early.
TICK_SECONDS = 0.01

# Numbers of ticks without items that are not worth a sweep.
_FEW = 64

T = TypeVar("T", bound=Hashable)


class Timers(Generic[T]):
    """Items, each due at a time in seconds. One item may stand at several times.

    Nearly all are cleared long before they are due, so a tick without items is forgotten at once. Its number stays in the heap
    until half of the heap is such numbers.
    """

    def __init__(self) -> None:
        self._at: dict[int, dict[T, None]] = {}
        self._ticks: list[int] = []

    def __len__(self) -> int:
        return sum(len(items) for items in self._at.values())

    def add(self, item: T, when: float) -> int:
        """Set a timer; the answer names it to `discard`."""
        tick = math.ceil(when / TICK_SECONDS)
        items = self._at.get(tick)
        if items is None:
            items = self._at[tick] = {}
            heapq.heappush(self._ticks, tick)
        items[item] = None
        return tick

    def discard(self, item: T, tick: int) -> None:
        """Clear a timer, if it is still set."""
        items = self._at.get(tick)
        if items is None:
            return
        items.pop(item, None)
        if not items:
            del self._at[tick]
            if len(self._ticks) > 2 * len(self._at) + _FEW:
                self._ticks = list(self._at)
                heapq.heapify(self._ticks)

    def due(self, now: float) -> list[T]:
        """Take the items whose time has come, earliest first."""
        found: list[T] = []
        while self._ticks and self._ticks[0] * TICK_SECONDS <= now:
            found += self._at.pop(heapq.heappop(self._ticks), ())
        return found

    def next_due(self) -> float | None:
        """When the next item is due; None if there is none."""
        while self._ticks and self._ticks[0] not in self._at:
            heapq.heappop(self._ticks)
        return self._ticks[0] * TICK_SECONDS if self._ticks else None
