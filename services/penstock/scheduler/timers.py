"""Many timers, each set and cleared in O(1): a hierarchy of two hashed wheels (Varghese and Lauck, 1987), each turned by a heap."""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

__all__ = ["TICK_SECONDS", "Timers"]

# A timer is late by less than this, and never early.
TICK_SECONDS = 0.01

# Ticks that go by before a timer has a tick of its own: until then it shares one place with all of its span.
_SPAN = 256

# Numbers without items that are not worth a sweep.
_FEW = 64

T = TypeVar("T", bound=Hashable)


class Timers(Generic[T]):
    """Items, each due at a time in seconds. One item may stand at several times.

    Nearly all are cleared long before they are due: a timer finds its tick when its span is near, and not before, unless its item
    has another in that span.

    Args:
        now: by the clock that they go by.
    """

    def __init__(self, now: float) -> None:
        self._ticks: _Wheel[T] = _Wheel()
        self._spans: _Wheel[T] = _Wheel()
        self._near = _near(now)  # the last span whose timers have ticks

    def __len__(self) -> int:
        return len(self._ticks) + len(self._spans)

    def add(self, item: T, when: float) -> int:
        """Set a timer; the answer names it to `discard`."""
        tick = math.ceil(when / TICK_SECONDS)
        span = tick // _SPAN
        if span <= self._near or self._ticks.has(item, tick) or not self._spans.add(item, span, tick):
            self._ticks.add(item, tick, tick)
        return tick

    def discard(self, item: T, tick: int) -> None:
        """Clear a timer, if it is still set."""
        span = tick // _SPAN
        if span <= self._near or not self._spans.discard(item, span, tick):
            self._ticks.discard(item, tick, tick)

    def due(self, now: float) -> list[T]:
        """Take the items whose time has come, earliest first."""
        self._near = max(self._near, _near(now))
        while (span := self._spans.first()) is not None and span <= self._near:
            for item, tick in self._spans.take(span):
                self._ticks.add(item, tick, tick)
        found: list[T] = []
        while (first := self._ticks.first()) is not None and first * TICK_SECONDS <= now:
            found += [item for item, _ in self._ticks.take(first)]
        return found

    def next_due(self) -> float | None:
        """When to ask for what is due: as the next item is, or before, as its span is near. None if there is none."""
        tick, span = self._ticks.first(), self._spans.first()
        ticks = [t for t in (tick, None if span is None else (span - 1) * _SPAN) if t is not None]
        return min(ticks) * TICK_SECONDS if ticks else None


def _near(now: float) -> int:
    """The span behind the one that is going by, by the same rounding as `Timers.next_due`."""
    tick = math.floor(now / TICK_SECONDS)
    tick += (tick + 1) * TICK_SECONDS <= now
    return tick // _SPAN + 1


class _Wheel(Generic[T]):
    """Items and their ticks by number. One without items is forgotten at once, but stays in the heap until half of that is such."""

    def __init__(self) -> None:
        self._at: dict[int, dict[T, int]] = {}
        self._numbers: list[int] = []

    def __len__(self) -> int:
        return sum(len(items) for items in self._at.values())

    def has(self, item: T, number: int) -> bool:
        return item in self._at.get(number, ())

    def add(self, item: T, number: int, tick: int) -> bool:
        """Whether the item stands there now with this tick: it may have another already."""
        items = self._at.get(number)
        if items is None:
            items = self._at[number] = {}
            heapq.heappush(self._numbers, number)
        return items.setdefault(item, tick) == tick

    def discard(self, item: T, number: int, tick: int) -> bool:
        """Whether it stood there with this tick."""
        items = self._at.get(number)
        if items is None or items.get(item) != tick:
            return False
        del items[item]
        if not items:
            del self._at[number]
            if len(self._numbers) > 2 * len(self._at) + _FEW:
                self._numbers = list(self._at)
                heapq.heapify(self._numbers)
        return True

    def first(self) -> int | None:
        """The least number that has items."""
        while self._numbers and self._numbers[0] not in self._at:
            heapq.heappop(self._numbers)
        return self._numbers[0] if self._numbers else None

    def take(self, number: int) -> Iterable[tuple[T, int]]:
        """The items of the number that is `first`."""
        return self._at.pop(number).items()
