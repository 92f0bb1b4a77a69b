"""Blocks are never lost and never given to two, after whatever happened."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock.common.prefix import block_hashes
from penstock.executor.blocks import BlockCounts, BlockManager

COUNT = 12
PROMPTS = st.lists(st.sampled_from("ab"), min_size=1, max_size=7)


class Blocks(RuleBasedStateMachine):
    """Sequences come and go; `content` is what a device would hold in each block."""

    copying = False

    def __init__(self):
        super().__init__()
        self.blocks = BlockManager(COUNT, copying=self.copying)
        self.held = []
        self.content = {}
        self.told = set()

    @rule(prompt=PROMPTS, computed=st.booleans())
    def begin(self, prompt, computed):
        hashes = block_hashes([ord(p) for p in prompt], 1, b"")
        shared = self.blocks.find(hashes)
        assert [self.content[b] for b in shared] == hashes[: len(shared)]
        fresh = len(hashes) - len(shared)
        if not self.blocks.can_allocate(shared, fresh):
            assert COUNT - len({b for held in self.held for b in held} | set(shared)) < fresh
            return
        got = self.blocks.allocate(shared, fresh)
        assert not set(got[len(shared) :]) & {b for held in self.held for b in held}
        self.held.append(got)
        if computed:
            for block, key in list(zip(got, hashes, strict=True))[len(shared) :]:
                self.content[block] = key
                self.blocks.register(block, key)
        else:
            self.content |= dict.fromkeys(got[len(shared) :])

    @rule(which=st.integers(0, 100))
    def end(self, which):
        if self.held:
            self.blocks.release(self.held.pop(which % len(self.held)))

    @rule()
    def clear(self):
        self.blocks.clear()

    @rule()
    def tell(self):
        changes = self.blocks.log.take()
        if changes is not None:
            self.told = (set() if changes.cleared else self.told - set(changes.removed)) | set(changes.stored)

    @invariant()
    def every_block_is_accounted_for(self):
        counts = self.blocks.counts()
        assert counts.used == len({b for held in self.held for b in held})
        assert counts.used + counts.cached + counts.free == COUNT

    @invariant()
    def what_is_found_is_what_was_told(self):
        self.tell()
        assert self.told == set(self.blocks._by_hash)
        assert self.told == set(self.blocks.log.snapshot().stored)

    def teardown(self):
        for held in self.held:
            self.blocks.release(held)
        assert self.blocks.available == COUNT
        assert len(set(self.blocks.allocate((), COUNT))) == COUNT


class CopiedBlocks(Blocks):
    """Each sequence has blocks of its own, into which what was found is copied."""

    copying = True

    @rule(prompt=PROMPTS)
    def begin(self, prompt):
        hashes = block_hashes([ord(p) for p in prompt], 1, b"")
        found = self.blocks.find(hashes)
        assert [self.content[b] for b in found] == hashes[: len(found)]
        if self.blocks.can_allocate(found, len(hashes)):
            own = self.blocks.allocate(found, len(hashes))[len(found) :]
            assert not set(own) & {b for held in [*self.held, found] for b in held}
            self.blocks.release(found)
            self.held.append(own)
            for block, key in zip(own, hashes, strict=True):
                self.content[block] = key
                self.blocks.register(block, key)


TestBlocks = Blocks.TestCase
TestCopiedBlocks = CopiedBlocks.TestCase
TestBlocks.settings = TestCopiedBlocks.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def filled(blocks, prompt):
    hashes = block_hashes(prompt, 1, b"")
    got = blocks.allocate((), len(prompt))
    for block, key in zip(got, hashes, strict=True):
        blocks.register(block, key)
    return got, hashes


def test_the_prefix_unused_for_longest_goes_first_and_its_end_before_its_begin():
    blocks = BlockManager(6)
    old, old_hashes = filled(blocks, [1, 2, 3])
    new, new_hashes = filled(blocks, [4, 5, 6])
    blocks.release(old)
    blocks.release(new)
    blocks.allocate((), 2)
    assert blocks.find(old_hashes) == old[:1]
    assert blocks.find(new_hashes) == new
    blocks.allocate((), 1)
    assert blocks.find(old_hashes) == []


def test_nothing_is_shared_where_caching_is_off():
    blocks = BlockManager(4, caching=False)
    got, hashes = filled(blocks, [1, 2])
    assert blocks.find(hashes) == []
    blocks.release(got)
    assert blocks.counts().free == 4


def test_what_comes_and_goes_between_two_readings_is_not_told():
    blocks = BlockManager(2)
    got, _ = filled(blocks, [1, 2])
    blocks.release(got)
    blocks.release(blocks.allocate((), 2))
    assert blocks.log.take() is None


def test_of_blocks_that_were_copied_one_is_found_until_all_are_gone():
    blocks = BlockManager(4, copying=True)
    one, hashes = filled(blocks, [1, 2])
    other, _ = filled(blocks, [1, 2])
    blocks.release(one)
    blocks.release(other)
    blocks.log.take()
    taken = [blocks.allocate((), 2)]
    assert blocks.find(hashes) == other
    assert blocks.log.take() is None
    taken.append(blocks.allocate((), 2))
    assert blocks.find(hashes) == []
    assert sorted(block for each in taken for block in each) == [0, 1, 2, 3]
    assert sorted(blocks.log.take().removed) == sorted(hashes)


@pytest.mark.parametrize("copying", [False, True])
def test_what_is_discarded_is_found_no_more_and_its_blocks_are_free(copying):
    blocks = BlockManager(7, copying=copying)
    one, hashes = filled(blocks, [1, 2])
    other, _ = filled(blocks, [1, 2])
    kept, kept_hashes = filled(blocks, [3])
    blocks.release(one)
    blocks.release(kept)
    blocks.log.take()
    blocks.discard(hashes)
    assert (blocks.find(hashes), blocks.find(kept_hashes)) == ([], kept)
    assert blocks.counts() == BlockCounts(used=2, cached=1, free=4)
    assert sorted(blocks.log.take().removed) == sorted(hashes)
    blocks.release(other)
    assert blocks.counts() == BlockCounts(used=0, cached=1, free=6)
