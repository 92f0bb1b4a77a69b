"""Which ranges of a buffer are taken: first fit, from the begin, so that memory that is warm in the cache is taken again first."""

from __future__ import annotations

import bisect

__all__ = ["ALIGNMENT", "Ranges"]

# A cache line: two ranges share none, so copying into one does not slow down reading of the other.
ALIGNMENT = 64


class Ranges:
    """Ranges of a buffer of `size` bytes. Each begins at a multiple of `ALIGNMENT`; none overlaps another."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = [(0, size)] if size else []  # (begin, end), rising, never adjacent
        self._taken: dict[int, int] = {}

    def take(self, size: int) -> int | None:
        """The begin of a free range of `size` ≥ 1 bytes, taken from now on; None where there is none."""
        for index, (begin, end) in enumerate(self._free):
            if end - begin < size:
                continue
            behind = min(begin + -(-size // ALIGNMENT) * ALIGNMENT, end)
            self._taken[begin] = behind
            self._free[index : index + 1] = [(behind, end)] if behind < end else []
            return begin
        return None

    def give(self, begin: int) -> None:
        """Free the range that was taken at `begin`.

        Raises:
            KeyError: none is.
        """
        end = self._taken.pop(begin)
        index = bisect.bisect(self._free, (begin, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index and self._free[index - 1][1] == begin:
            index -= 1
            begin = self._free.pop(index)[0]
        self._free.insert(index, (begin, end))
