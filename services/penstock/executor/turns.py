"""In which order an engine's sequences take their turns: as they came, and within each tenant by priority.

The scheduler has shared the turns out between tenants by the order in which it placed them. A priority is a client's word: a
sequence that bears a higher one than others of its tenant takes the first of their turns, and each of them takes the next.
"""

from __future__ import annotations

from bisect import bisect_right

from penstock.executor.sequence import Sequence

__all__ = ["Turns"]


class Turns:
    """Gives the sequences of an engine their ranks, each a number of arrival, for as long as they are in it."""

    def __init__(self) -> None:
        self._arrivals = 0
        self._tenants: dict[str, list[Sequence]] = {}

    def add(self, sequence: Sequence) -> bool:
        """Rank a sequence that comes now; whether others of its tenant have other ranks than before."""
        self._arrivals += 1
        mine = self._tenants.setdefault(sequence.request.tenant, [])
        place = bisect_right(mine, -sequence.request.priority, key=lambda s: -s.request.priority)
        behind = mine[place:]
        mine.insert(place, sequence)
        ranks = [*(s.rank for s in behind), self._arrivals]
        for each, rank in zip(mine[place:], ranks, strict=True):
            each.rank = rank
        return bool(behind)

    def remove(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        tenant = sequence.request.tenant
        mine = self._tenants[tenant]
        mine.remove(sequence)
        if not mine:
            del self._tenants[tenant]
