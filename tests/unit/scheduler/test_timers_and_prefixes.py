import tracemalloc

from hypothesis import example, given
from hypothesis import strategies as st

from penstock.scheduler import timers as timers_module
from penstock.scheduler.admission import DrainRate, admits, retry_after
from penstock.scheduler.prefixes import PrefixIndex, unpack_hashes
from penstock.scheduler.timers import TICK_SECONDS, Timers

SECONDS = st.floats(0, 9)
ADD = st.tuples(st.just("add"), st.integers(0, 3), SECONDS)
CLEAR = st.tuples(st.just("clear"), st.integers(0, 9), st.none())
LOOK = st.tuples(st.just("look"), st.none(), SECONDS)


@given(st.lists(ADD | CLEAR | LOOK, max_size=60), st.floats(0, 2000))
@example([("add", 1, 5.0), ("add", 1, 4.0), ("clear", 0, None), ("add", 1, 4.0)], 1000.0)
@example([("add", 1, 5.0), ("look", None, 0.0)], 74.24)  # a span begins, by one way of rounding
def test_timers_fire_once_never_early_and_less_than_a_tick_late(asked, now):
    waiting, cleared = [], []
    timers = Timers(now)
    for what, which, seconds in asked:
        if what == "add":
            tick = timers.add(which, now + seconds)
            if all(there[:2] != (which, tick) for there in waiting):  # one item at one time is one timer
                waiting.append((which, tick, now + seconds))
        elif what == "clear" and which < len(waiting):
            item, tick, _ = waiting.pop(which)
            timers.discard(item, tick)
            cleared.append((item, tick))
        elif what == "look":
            now += seconds
            for item in timers.due(now):
                found = min((there for there in waiting if there[0] == item), key=lambda there: there[1])
                assert found[1] * TICK_SECONDS <= now
                waiting.remove(found)
            assert all(when > now - TICK_SECONDS - 1e-9 for *_, when in waiting)
            wake = timers.next_due()
            assert wake is None or now < wake < min(when for *_, when in waiting) + TICK_SECONDS + 1e-9
        assert len(timers) == len(waiting)
        assert (timers.next_due() is None) == (not waiting)
    for item, tick in cleared:
        if all(there[:2] != (item, tick) for there in waiting):
            timers.discard(item, tick)
    assert len(timers) == len(waiting)


def test_a_cleared_timer_leaves_nothing_however_far_away_it_was():
    timers = Timers(9.0)
    timers.add("waits", 10.0)
    tracemalloc.start()
    try:
        for number in range(5000):
            timers.discard(number, timers.add(number, 86_400 + number))
            assert timers.next_due() == 10.0
        held = tracemalloc.take_snapshot().filter_traces(
            [tracemalloc.Filter(inclusive=True, filename_pattern=timers_module.__file__)]
        )
    finally:
        tracemalloc.stop()
    assert sum(trace.size for trace in held.traces) < 32_768


BLOCKS = st.lists(st.integers(0, 6), max_size=8)


@given(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(["store", "remove", "clear", "rejoin"]), BLOCKS), max_size=30), BLOCKS)
def test_prefix_index_is_what_sets_would_tell(changes, asked):
    index = PrefixIndex()
    bits = [index.join() for _ in range(3)]
    sets = [set(), set(), set()]
    for who, what, blocks in changes:
        match what:
            case "store":
                index.store(bits[who], blocks)
                sets[who] |= set(blocks)
            case "remove":
                index.remove(bits[who], blocks)
                sets[who] -= set(blocks)
            case "clear":
                index.clear(bits[who])
                sets[who] = set()
            case "rejoin":
                index.leave(bits[who])
                bits[who] = index.join()
                sets[who] = set()
    expected = {}
    for bit, held in zip(bits, sets, strict=True):
        depth = next((i for i, block in enumerate(asked) if block not in held), len(asked))
        if depth:
            expected[bit] = depth
    assert index.depths(asked, sum(bits)) == expected
    assert index.depths(asked, bits[0]) == {bit: depth for bit, depth in expected.items() if bit == bits[0]}


def test_hashes_are_eight_bytes_each_and_a_rest_is_left_out():
    assert list(unpack_hashes(b"\x01" * 8 + b"\x02" * 8 + b"\x03")) == [0x0101010101010101, 0x0202020202020202]
    assert list(unpack_hashes(b"")) == []


@given(st.integers(1, 100), st.integers(1, 5))
def test_small_queues_take_all_that_they_say(limit, tenants):
    taken = sum(admits(queued, limit, queued, tenants) for queued in range(limit))
    assert taken >= limit - limit // 10
    assert not admits(limit, limit, 0, tenants)
    assert admits(limit - 1, limit, 0, tenants)


def test_drain_rate_is_right_from_the_start_and_forgets():
    rate = DrainRate(0.0)
    assert rate.per_second(5.0) == 0
    for i in range(20):
        rate.mark(5.0 + i / 20)
    assert 3 < rate.per_second(6.0) < 8
    assert rate.per_second(200.0) < 0.01


def test_time_to_come_back_is_bounded():
    assert retry_after(1000, 0.0) == 1.0
    assert retry_after(1000, 1e9) == 0.1
    assert retry_after(1000, 1e-9) == 30.0
    assert retry_after(1000, 50.0) == 2.0
