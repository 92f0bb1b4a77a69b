"""The room of a link: which ranges are taken, and who waits for one."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from penstock.executor.handoff.transports.port import LinkClosed, PayloadTooLarge, SharedPayload
from penstock.executor.handoff.transports.ranges import ALIGNMENT, Ranges
from penstock.executor.handoff.transports.window import Window

SIZE = 64 * ALIGNMENT - 24  # its last cache line is not whole


class RangesAgainstAMap(RuleBasedStateMachine):
    """Beside the ranges, a map of bytes that says for each which range has it."""

    def __init__(self):
        super().__init__()
        self.ranges = Ranges(SIZE)
        self.owner = [None] * SIZE
        self.sizes = {}

    def paint(self, begin, owner):
        for byte in range(begin, begin + self.sizes[begin]):
            assert (self.owner[byte] is None) != (owner is None)
            self.owner[byte] = owner

    @rule(size=st.integers(1, SIZE))
    def take(self, size):
        begin = self.ranges.take(size)
        if begin is None:
            starts = [i for i in range(0, SIZE - size + 1, ALIGNMENT) if not any(o is not None for o in self.owner[i : i + size])]
            assert not starts, "there was room"
        else:
            assert begin % ALIGNMENT == 0
            self.sizes[begin] = size
            self.paint(begin, begin)

    @rule(choice=st.integers(0, 1 << 16))
    def give(self, choice):
        if self.sizes:
            begin = sorted(self.sizes)[choice % len(self.sizes)]
            self.ranges.give(begin)
            self.paint(begin, None)
            del self.sizes[begin]

    def teardown(self):
        for begin in list(self.sizes):
            self.ranges.give(begin)
        assert self.ranges.take(SIZE) == 0


TestRanges = RangesAgainstAMap.TestCase
TestRanges.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_was_not_taken_can_not_be_given():
    ranges = Ranges(256)
    ranges.take(100)
    ranges.give(0)
    with pytest.raises(KeyError):
        ranges.give(0)


@given(st.lists(st.tuples(st.integers(1, 200), st.booleans()), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_everyone_gets_room_in_turn_whoever_gives_up(asked):
    async def scene():
        window = Window(256)
        served = []

        async def one(number, size):
            begin = await window.take(size)
            served.append(number)
            try:
                await asyncio.sleep(0)
            finally:
                window.give(begin)

        tasks = [asyncio.create_task(one(number, size)) for number, (size, _) in enumerate(asked)]
        await asyncio.sleep(0)
        for task, (_, cancelled) in zip(tasks, asked, strict=True):
            if cancelled:
                task.cancel()
        async with asyncio.timeout(10):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert served == sorted(served)
        assert set(served) >= {number for number, (_, cancelled) in enumerate(asked) if not cancelled}
        async with asyncio.timeout(10):
            assert await window.take(256) == 0

    asyncio.run(scene())


async def test_a_small_payload_does_not_overtake_a_large_one_for_ever():
    window = Window(256)
    first = await window.take(128)
    large, small = asyncio.create_task(window.take(256)), asyncio.create_task(window.take(64))
    await asyncio.sleep(0)
    assert not small.done()
    window.give(first)
    window.give(await large)
    assert await small == 0


async def test_payload_that_no_window_could_hold_is_refused_at_once():
    window = Window(256)
    for size in (0, 257):
        with pytest.raises(PayloadTooLarge, match="1 to 256"):
            await window.take(size)


async def test_a_closed_link_lets_nobody_wait():
    window = Window(256)
    await window.take(256)
    waiting = asyncio.create_task(window.take(1))
    await asyncio.sleep(0)
    window.close()
    with pytest.raises(LinkClosed):
        await waiting
    with pytest.raises(LinkClosed):
        await window.take(1)


async def test_payload_released_twice_frees_nothing_of_the_next_one():
    window = Window(256)
    first = SharedPayload(await window.take(256), 256)
    window.hold(first, 0)
    window.release(first)
    second = SharedPayload(await window.take(256), 256)
    window.hold(second, 0)
    window.release(first)
    third = asyncio.create_task(window.take(256))
    await asyncio.sleep(0)
    assert not third.done()
    window.release(second)
    assert await third == 0
