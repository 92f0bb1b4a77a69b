"""Which KV block holds what: allocation, sharing of equal prefixes, and eviction, each in constant time per block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penstock.executor.kv_events import KvLog

__all__ = ["BlockCounts", "BlockManager"]


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Every block is in one of these states: used by a sequence, kept for its prefix alone, or free."""

    used: int
    cached: int
    free: int


class BlockManager:
    """Blocks 0 … count - 1, counted by reference.

    A full block whose tokens have been computed can be registered under the hash of all tokens up to its end. Then other sequences
    may share it, and when no sequence uses it any more it stays until its room is needed; the one unused for longest goes first.

    Args:
        count: how many.
        caching: whether any is found again.
        copying: whether sequences copy what they find instead of sharing it. Then all blocks of one content stay, not the first
            alone: each of them lies before others of its own sequence, which can be copied only as long as it is there.
    """

    def __init__(self, count: int, *, caching: bool = True, copying: bool = False) -> None:
        self.count = count
        self.log = KvLog()
        self.caching = caching
        self._copying = copying
        self._free = list(range(count - 1, -1, -1))
        self._users = [0] * count
        self._hashes: list[bytes | None] = [None] * count
        self._by_hash: dict[bytes, int] = {}
        # Others of the same content, where they stay.
        self._copies: dict[bytes, dict[int, None]] = {}
        # Registered blocks without users, the one to evict next first: a dict keeps the order of insertion.
        self._unused: dict[int, None] = {}

    @property
    def available(self) -> int:
        """Blocks that can be allocated now, cached ones that nobody uses included."""
        return len(self._free) + len(self._unused)

    def counts(self) -> BlockCounts:
        """How many blocks are in which state."""
        free, cached = len(self._free), len(self._unused)
        return BlockCounts(self.count - free - cached, cached, free)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The cached blocks of the longest prefix; nothing changes."""
        found: list[int] = []
        for key in hashes:
            block = self._by_hash.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def can_allocate(self, shared: Sequence[int], fresh: int, spare: int = 0) -> bool:
        """Whether `allocate` can be done, and leaves `spare` blocks available."""
        return self.available - sum(1 for block in shared if not self._users[block]) >= fresh + spare

    def allocate(self, shared: Sequence[int], fresh: int) -> list[int]:
        """Use found blocks, and others with nothing in them, together. Only after `can_allocate`."""
        for block in shared:
            if not self._users[block]:
                del self._unused[block]
            self._users[block] += 1
        return [*shared, *(self._take() for _ in range(fresh))]

    def register(self, block: int, key: bytes) -> None:
        """Let a used, full and computed block be found. Where another is found under the same hash already, that one stays."""
        if not self.caching or self._hashes[block] is not None:
            return
        if key not in self._by_hash:
            self._hashes[block] = key
            self._by_hash[key] = block
            self.log.stored(key)
        elif self._copying:
            self._hashes[block] = key
            self._copies.setdefault(key, {})[block] = None

    def forget(self, block: int) -> None:
        """Let a used block be found no more: what it held is gone."""
        key = self._hashes[block]
        if key is not None:
            self._hashes[block] = None
            self._unregister(block, key)

    def discard(self, keys: Sequence[bytes]) -> None:
        """Let nothing be found under these hashes any more, whoever computed it."""
        for key in keys:
            while (block := self._by_hash.get(key)) is not None:
                self.forget(block)
                if block in self._unused:
                    del self._unused[block]
                    self._free.append(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Give a sequence's blocks back. The end of a prefix is evicted before its begin, without which it can't be found."""
        for block in reversed(blocks):
            self._users[block] -= 1
            if self._users[block]:
                continue
            if self._hashes[block] is None:
                self._free.append(block)
            else:
                self._unused[block] = None

    def clear(self) -> None:
        """Forget every prefix. Used blocks stay used."""
        self._free.extend(self._unused)
        self._unused.clear()
        self._by_hash.clear()
        self._copies.clear()
        self._hashes = [None] * self.count
        self.log.cleared()

    def _take(self) -> int:
        block = self._free.pop() if self._free else self._evict()
        self._users[block] = 1
        return block

    def _evict(self) -> int:
        block = next(iter(self._unused))
        del self._unused[block]
        key = self._hashes[block]
        if key is not None:
            self._hashes[block] = None
            self._unregister(block, key)
        return block

    def _unregister(self, block: int, key: bytes) -> None:
        copies = self._copies.get(key)
        if copies is None:
            del self._by_hash[key]
            self.log.removed(key)
            return
        if self._by_hash[key] == block:
            self._by_hash[key], _ = copies.popitem()
        else:
            del copies[block]
        if not copies:
            del self._copies[key]
