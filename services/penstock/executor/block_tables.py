"""The blocks that each sequence has, and what they begin with."""

from __future__ import annotations

from collections.abc import Callable

from penstock.executor.blocks import BlockManager
from penstock.executor.sequence import Sequence

__all__ = ["BlockTables"]


class BlockTables:
    """A sequence begins with what is cached of its prompt: in blocks that it shares, or with copies of them.

    Args:
        blocks: of the cache; not to be shared where prefixes are copied.
        block_size: tokens of each.
        copy_prefix: copies blocks into others, as `PrefixCopies` does; None: sequences share them.

    Attributes:
        copying: whether prefixes are copied.
    """

    def __init__(
        self, blocks: BlockManager, block_size: int, copy_prefix: Callable[[list[int], list[int]], int] | None = None
    ) -> None:
        self.copying = copy_prefix is not None
        self._blocks = blocks
        self._block_size = block_size
        self._copy_prefix = copy_prefix

    @property
    def count(self) -> int:
        """Blocks of the cache."""
        return self._blocks.count

    @property
    def caching(self) -> bool:
        """Whether prefixes are found at all."""
        return self._blocks.caching

    def find_cached(self, sequence: Sequence, running: int) -> tuple[list[int], int]:
        """Cached blocks that a sequence can begin with, and how many others it needs, beside so many that run.

        Its last token is computed in any case, for its logits. Where blocks are copied, no more are than there is room for beside
        what it needs without them.
        """
        needed = -(-len(sequence.ids) // self._block_size)
        if not self.caching or sequence.wants_prompt_logprobs:
            return [], needed
        cached = self._blocks.find(sequence.hashes[: (len(sequence.ids) - 1) // self._block_size])
        if self.copying:
            return cached[: max(0, self._blocks.available - needed - running)], needed
        return cached, needed - len(cached)

    def has_room(self, cached: list[int], fresh: int, running: int) -> bool:
        """Whether a sequence can have these, and each of those that run a block more.

        Each may need one soon; a newcomer that takes the last ones would only be preempted.
        """
        return self._blocks.can_allocate(cached, fresh, spare=running)

    def hold(self, sequence: Sequence, cached: list[int], fresh: int) -> None:
        """Give a sequence its blocks, the first of them with what was found."""
        blocks = self._blocks.allocate(cached, fresh)
        if self._copy_prefix is None:
            sequence.hold(blocks)
            sequence.registered = len(cached)
            sequence.computed = len(cached) * self._block_size
            return
        own = blocks[len(cached) :]
        sequence.hold(own)
        try:
            copied = self._copy_prefix(cached, own[: len(cached)]) if cached else 0
            if copied < len(cached):  # it would be found again, and hide what is computed in its place
                self._blocks.forget(cached[copied])
        finally:
            self._blocks.release(cached)
        sequence.computed = copied * self._block_size
        self.register(sequence)

    def grow(self, sequence: Sequence) -> bool:
        """Give a sequence a block for its next token if it needs one; False where there is none."""
        if sequence.blocks * self._block_size < len(sequence.ids):
            if not self._blocks.can_allocate((), 1):
                return False
            sequence.hold(self._blocks.allocate((), 1))
        return True

    def register(self, sequence: Sequence) -> None:
        """More of a sequence is computed: blocks that are full can be shared from now on."""
        full = sequence.computed // self._block_size
        for i in range(sequence.registered, full):
            self._blocks.register(int(sequence.table[i]), sequence.hashes[i])
        sequence.registered = full

    def distrust(self, sequence: Sequence) -> None:
        """What a sequence's blocks hold is wrong, and may have been when it found them: no other begins with it."""
        self._blocks.discard(sequence.hashes[: sequence.registered])

    def give_back(self, sequence: Sequence) -> None:
        """Take all blocks of a sequence."""
        self._blocks.release(sequence.table[: sequence.blocks].tolist())
        sequence.blocks = sequence.computed = sequence.registered = 0
