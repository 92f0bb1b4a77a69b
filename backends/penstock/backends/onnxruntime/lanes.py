"""Which lane of the cache a sequence's KV lies in.

The attention operator wants each sequence's past in one piece, and the sequences of a batch side by side: lanes. The engine counts
in blocks of tokens. A sequence is known by its first block, and a block is in one lane at most, so a lane that loses a block to
another sequence is cut off before it. Lanes are address space; of memory, each takes what it holds. All of them together so never
take more than the blocks.

What an ended sequence held stays until its blocks go to others, and new ones may begin with a copy of it.

KV that arrives from elsewhere arrives in order. Where another sequence has taken the lane meanwhile, the rest of it is refused.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import groupby, takewhile
from operator import itemgetter
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["LaneContents", "Lanes"]

_NOBODY = -1

T = TypeVar("T")


class LaneContents(Protocol):
    """What lies in lanes."""

    def keep(self, lane: int, tokens: int) -> None:
        """What a lane holds behind its first tokens is wanted no more."""

    def copy(self, source: int, target: int, tokens: range) -> None:
        """Copy tokens of a lane to the same places of another."""

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Exchange the first tokens of two lanes."""


class Lanes:
    """Assigns lanes 0 … count - 1.

    Args:
        count: lanes.
        blocks: ids of blocks go from 0 to `blocks` - 1.
        block_size: tokens of a block.
        contents: of the lanes.
    """

    def __init__(self, count: int, blocks: int, block_size: int, contents: LaneContents) -> None:
        self.lengths = [0] * count
        self._held: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * count
        self._owner = np.full(blocks, _NOBODY, np.int64)
        self._used = [0] * count
        self._free = list(range(count))
        self._now = 0
        self._block_size = block_size
        self._contents = contents

    def step(self, blocks: NDArray[np.int32], past: int, length: int) -> int:
        """The lane of a sequence that a step brings from `past` to `length` tokens.

        Raises:
            RuntimeError: its past is not here.
        """
        lane = self._find(blocks)
        if not past:
            lane = self._begin(lane)
        elif lane is None or self.lengths[lane] < past:
            raise RuntimeError(f"the KV of {past} tokens, behind which a step begins, is not in the cache")
        self._extend(lane, blocks)
        self.lengths[lane] = length
        return lane

    def find(self, blocks: Sequence[int], tokens: int) -> int:
        """The lane that holds so many tokens of a sequence of these blocks.

        Raises:
            RuntimeError: some of them are not here.
        """
        ids = np.asarray(blocks, np.int64)
        lane = self._find(ids)
        if lane is None or self.lengths[lane] < tokens or not self._agrees(lane, ids):
            raise RuntimeError(f"the KV of {tokens} tokens, that is asked for, is not in the cache")
        return lane

    def receive(self, blocks: Sequence[int], tokens: range) -> int:
        """The lane of a sequence of which `tokens` arrive from elsewhere; a new one where they are its first.

        Raises:
            RuntimeError: what stands before them is not here.
        """
        ids = np.asarray(blocks, np.int64)
        lane = self.find(blocks, tokens.start) if tokens.start else self._begin(self._find(ids))
        self._extend(lane, ids)
        self.lengths[lane] = max(self.lengths[lane], tokens.stop)
        return lane

    def copy(self, source: Sequence[int], target: Sequence[int]) -> int:
        """Begin a sequence with what these blocks hold, the i-th being the i-th of some sequence; how many of them were copied."""
        ids = np.asarray(target, np.int64)
        sources = [lane for lane, _ in self._pieces(source)]
        if not sources:
            return 0
        for lane in sources:
            self._used[lane] = self._now + 1  # not one of these is the one to be emptied
        into = self._begin(self._find(ids))
        copied = 0
        for lane, piece in self._pieces(source):
            self._contents.copy(lane, into, range(piece.start * self._block_size, piece.stop * self._block_size))
            copied = piece.stop
        if copied:
            self._extend(into, ids[:copied])
            self.lengths[into] = copied * self._block_size
        else:
            self._drop(into)
        return copied

    def gather(self, lanes: Sequence[int]) -> list[int]:
        """Move sequences so that these lie side by side; where each of them is then."""
        window = _best_window(sorted(lanes), len(self.lengths))
        holes = iter([lane for lane in window if lane not in set(lanes)])
        return [lane if lane in window else self._carry(lane, next(holes)) for lane in lanes]

    def _find(self, blocks: NDArray[np.int32] | NDArray[np.int64]) -> int | None:
        first = blocks[0]
        lane = int(self._owner[first])
        return lane if lane != _NOBODY and self._held[lane][0] == first else None

    def _agrees(self, lane: int, blocks: NDArray[np.int64]) -> bool:
        common = min(len(blocks), len(self._held[lane]))
        return np.array_equal(blocks[:common], self._held[lane][:common])

    def _pieces(self, blocks: Sequence[int]) -> Iterator[tuple[int, range]]:
        """The lanes in which the first of these blocks lie, each in its own place, and which of them lie in each."""
        lanes = takewhile(lambda lane: lane != _NOBODY, (self._lane_of(block, i) for i, block in enumerate(blocks)))
        for lane, piece in groupby(enumerate(lanes), key=itemgetter(1)):
            places = [i for i, _ in piece]
            yield lane, range(places[0], places[-1] + 1)

    def _lane_of(self, block: int, place: int) -> int:
        """The lane whose `place`-th block this is, and full; or nobody's."""
        lane = int(self._owner[block])
        if lane == _NOBODY or self.lengths[lane] < (place + 1) * self._block_size or self._held[lane][place] != block:
            return _NOBODY
        return lane

    def _begin(self, lane: int | None) -> int:
        """An empty lane: the sequence's own, a free one, or the one that has not been used for longest."""
        self._now += 1
        if lane is None and not self._free:
            lane = min(range(len(self._used)), key=self._used.__getitem__)
        if lane is not None:
            self._drop(lane)
        return heapq.heappop(self._free)

    def _extend(self, lane: int, blocks: NDArray[np.int32] | NDArray[np.int64]) -> None:
        self._used[lane] = self._now
        known = len(self._held[lane])
        if len(blocks) <= known:
            return
        fresh = blocks[known:]
        for other in set(self._owner[fresh].tolist()) - {_NOBODY, lane}:
            self._cut(other, int(np.isin(self._held[other], fresh).argmax()))
        self._owner[fresh] = lane
        self._held[lane] = np.array(blocks, np.int64)

    def _drop(self, lane: int) -> None:
        self._cut(lane, 0)

    def _cut(self, lane: int, blocks: int) -> None:
        """Keep of a lane its first blocks alone."""
        self._owner[self._held[lane][blocks:]] = _NOBODY
        self._held[lane] = self._held[lane][:blocks]
        self.lengths[lane] = min(self.lengths[lane], blocks * self._block_size)
        self._contents.keep(lane, self.lengths[lane])
        if not blocks:
            heapq.heappush(self._free, lane)

    def _carry(self, source: int, target: int) -> int:
        """Put what is in one lane into another, and what was there into the first."""
        if len(self._held[target]):
            self._contents.swap(source, target, max(self.lengths[source], self.lengths[target]))
        else:
            self._free.remove(target)
            heapq.heapify(self._free)
            self._contents.copy(source, target, range(self.lengths[source]))
            self._contents.keep(source, 0)
        _exchange(self.lengths, source, target)
        _exchange(self._held, source, target)
        _exchange(self._used, source, target)
        for lane in (source, target):
            self._owner[self._held[lane]] = lane
        if not len(self._held[source]):
            heapq.heappush(self._free, source)
        return target


def _exchange(values: list[T], one: int, other: int) -> None:
    values[one], values[other] = values[other], values[one]


def _best_window(lanes: Sequence[int], count: int) -> range:
    """As many lanes side by side as there are in `lanes`, which rise, with the most of them inside."""
    size = len(lanes)
    best, most = 0, 0
    for i, lane in enumerate(lanes):
        start = min(lane, count - size)
        inside = sum(start <= other < start + size for other in lanes[max(0, i - size) :])
        if inside > most:
            best, most = start, inside
        if inside == size:
            break
    return range(best, best + size)
