"""Stop texts in a stream.

An Aho-Corasick automaton (Aho and Corasick, 1975): a character costs the same however many stop texts there are, and however they
overlap.

The match that is complete first wins; of those complete at the same character the longest, then the first listed. So which one is
found does not depend on how the text was cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import lru_cache

__all__ = ["StopTexts", "stop_texts"]


class StopTexts:
    """The automaton of some stop texts. States are numbers, 0 the beginning; immutable once built.

    Attributes:
        first: characters that some stop text begins with.
        match: by state, the position of the stop text that is complete there; -1 where none is.
        held: by state, how many of the last characters may become a stop text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.lengths = [len(stop) for stop in stops]
        self.first = frozenset(stop[0] for stop in stops if stop)
        self.match = [-1]
        self.held = [0]
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        for position, stop in enumerate(stops):
            if stop:
                self._insert(position, stop)
        self._link()

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        following, fail = self._next, self._fail
        while state and char not in following[state]:
            state = fail[state]
        return following[state].get(char, 0)

    def _insert(self, position: int, stop: str) -> None:
        state = 0
        for depth, char in enumerate(stop, start=1):
            if char not in self._next[state]:
                self._next[state][char] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self.match.append(-1)
                self.held.append(depth)
            state = self._next[state][char]
        if self.match[state] < 0:
            self.match[state] = position

    def _link(self) -> None:
        """Breadth first: where to go on when a character does not fit, and what is complete there."""
        waiting = deque(self._next[0].values())
        while waiting:
            state = waiting.popleft()
            for char, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], char)
                waiting.append(child)
            fail = self._fail[state]
            if self.match[state] < 0:
                self.match[state] = self.match[fail]
            if not self._next[state]:
                self.held[state] = self.held[fail]


# A request's choices share one, and so do requests of one kind. Few are kept: the largest take four megabytes each.
@lru_cache(maxsize=16)
def stop_texts(stops: tuple[str, ...]) -> StopTexts:
    """The automaton of these stop texts; many decodings share one."""
    return StopTexts(stops)
