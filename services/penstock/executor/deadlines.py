"""When an engine's sequences are to end at the latest."""

from __future__ import annotations

import heapq
import itertools
import math

from penstock.executor.sequence import Sequence, Status

__all__ = ["Deadlines"]

# As many of sequences that ended before are kept in any case.
_FEW = 64


class Deadlines:
    """The earliest first. That of a sequence which ends before stays until its time, or until most are of such."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []
        self._count = itertools.count()  # settles ties

    @property
    def next(self) -> float:
        """When `expired` may next have something to tell; infinite where nothing has a deadline."""
        return self._heap[0][0] if self._heap else math.inf

    def add(self, sequence: Sequence, live: int) -> None:
        """Note a sequence's deadline, if it has one, where so many sequences are live."""
        if sequence.request.deadline is None:
            return
        if len(self._heap) > _FEW + 2 * live:
            self._heap = [entry for entry in self._heap if entry[2].status is not Status.DONE]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (sequence.request.deadline, next(self._count), sequence))

    def expired(self, now: float) -> list[Sequence]:
        """The sequences whose deadline has passed, each told once."""
        late: list[Sequence] = []
        while self._heap and self._heap[0][0] <= now:
            sequence = heapq.heappop(self._heap)[2]
            if sequence.status is not Status.DONE:
                late.append(sequence)
        return late
