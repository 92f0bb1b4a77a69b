"""Which executor holds which cached blocks, as their KV events tell."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["PrefixIndex", "unpack_hashes"]


def unpack_hashes(packed: bytes) -> Sequence[int]:
    """Block hashes of 8 bytes each, as messages hold them; a rest that is no whole hash is left out."""
    return memoryview(packed)[: len(packed) // 8 * 8].cast("Q")


class PrefixIndex:
    """Block hash → the set of executors that hold the block, as a bit mask, so that one walk finds every executor's prefix."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}
        self._held: dict[int, set[int]] = {}
        self._free_bits: list[int] = []

    def join(self) -> int:
        """A bit for another executor."""
        bit = self._free_bits.pop() if self._free_bits else 1 << len(self._held)
        self._held[bit] = set()
        return bit

    def leave(self, bit: int) -> None:
        """Forget an executor; its bit goes to another."""
        self.clear(bit)
        del self._held[bit]
        self._free_bits.append(bit)

    def held(self, bit: int) -> int:
        """How many blocks an executor is known to hold."""
        return len(self._held[bit])

    def store(self, bit: int, hashes: Iterable[int]) -> None:
        """An executor's cache holds these now."""
        holders, held = self._holders, self._held[bit]
        for block in hashes:
            holders[block] = holders.get(block, 0) | bit
            held.add(block)

    def remove(self, bit: int, hashes: Iterable[int]) -> None:
        """An executor's cache holds these no more."""
        holders, held = self._holders, self._held[bit]
        for block in hashes:
            if block in held:
                held.discard(block)
                left = holders[block] & ~bit
                if left:
                    holders[block] = left
                else:
                    del holders[block]

    def clear(self, bit: int) -> None:
        """An executor's cache is empty, or nothing is known of it any more."""
        self.remove(bit, tuple(self._held[bit]))

    def depths(self, hashes: Sequence[int], among: int) -> dict[int, int]:
        """How many leading blocks each executor holds, by bit, for those of the mask `among` that hold any.

        A hash stands for all that is before it, but an executor may have evicted a block in the middle: what is behind that one is
        of no use.
        """
        depths: dict[int, int] = {}
        alive, get = among, self._holders.get
        depth = 0
        for block in hashes:
            holders = get(block, 0) & alive
            if holders != alive:
                if depth:
                    _note(depths, alive & ~holders, depth)
                alive = holders
                if not alive:
                    return depths
            depth += 1
        if depth:
            _note(depths, alive, depth)
        return depths


def _note(depths: dict[int, int], mask: int, depth: int) -> None:
    while mask:
        bit = mask & -mask
        depths[bit] = depth
        mask ^= bit
