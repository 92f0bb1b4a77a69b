"""Which lane a sequence's KV is in: nobody's KV is lost to a move, what nobody holds is given back, and prefixes are copied."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.backends.onnxruntime.lanes import Lanes

COUNT, BLOCKS, BLOCK_SIZE = 6, 24, 4
LENGTH = 40


class Store:
    """Lanes whose tokens are names."""

    def __init__(self, count=COUNT):
        self.contents = np.full((count, LENGTH), None)
        self.lanes = Lanes(count, BLOCKS, BLOCK_SIZE, self)

    def keep(self, lane, tokens):
        self.contents[lane, tokens:] = None

    def copy(self, source, target, tokens):
        self.contents[target, tokens.start : tokens.stop] = self.contents[source, tokens.start : tokens.stop]

    def swap(self, one, other, _):
        self.contents[[one, other]] = self.contents[[other, one]]

    def step(self, name, blocks, past, tokens=1):
        lane = self.lanes.step(np.array(blocks, np.int32), past, past + tokens)
        self.contents[lane, past : past + tokens] = name
        return lane

    def holds(self, name):
        return name in self.contents


def test_sequences_side_by_side_stay_where_they_are():
    store = Store()
    lanes = [store.step(i, [i], 0) for i in range(4)]
    assert store.lanes.gather(lanes) == lanes == [0, 1, 2, 3]


def test_a_gap_is_closed_by_the_sequence_that_is_away_from_the_others():
    store = Store()
    lanes = [store.step(name, [i], 0) for i, name in enumerate("abcde")]
    moved = store.lanes.gather([lanes[i] for i in (0, 1, 3)])
    assert sorted(moved) == [0, 1, 2]
    assert [store.contents[lane, 0] for lane in moved] == ["a", "b", "d"]
    assert store.holds("c")  # it did not step, and is still somewhere


def test_a_sequence_whose_first_block_another_took_is_gone():
    store = Store()
    store.step("old", [3, 4], 0)
    store.step("new", [5, 3], 0)
    assert not store.holds("old")
    with pytest.raises(RuntimeError, match="the KV of 1 tokens"):
        store.step("old", [3, 4], 1)


def test_of_a_sequence_whose_later_block_another_took_its_begin_stays():
    store = Store()
    lane = store.step("old", [3, 4, 6], 0, 11)
    store.step("new", [5, 4], 0)
    assert store.contents[lane].tolist() == ["old"] * BLOCK_SIZE + [None] * (LENGTH - BLOCK_SIZE)
    assert store.lanes.find([3, 4, 6], BLOCK_SIZE) == lane
    with pytest.raises(RuntimeError, match="the KV of 11 tokens"):
        store.step("old", [3, 4, 6], 11)


def test_a_new_sequence_begins_with_a_copy():
    store = Store()
    store.step("old", [3, 4, 6], 0, 11)
    assert store.lanes.copy([3, 4], [7, 8]) == 2
    lane = store.step("new", [7, 8, 9], 2 * BLOCK_SIZE, 3)
    assert store.contents[lane, :11].tolist() == ["old"] * 8 + ["new"] * 3
    assert store.step("old", [3, 4, 6], 11) != lane


@pytest.mark.parametrize(
    ("source", "copied"),
    [
        ([3, 4, 6], 2),  # the third block is not full
        ([4], 0),  # it is no first one
        ([3, 20], 1),  # nobody has it
        ([10, 4], 2),  # of one sequence, then of the other
        ([3, 11, 6], 2),
    ],
)
def test_so_much_is_copied_as_is_there(source, copied):
    store = Store()
    store.step("one", [3, 4, 6], 0, 11)
    store.step("other", [10, 11], 0, 8)
    names = [store.contents[store.lanes._owner[block], i * BLOCK_SIZE] for i, block in enumerate(source[:copied])]
    assert store.lanes.copy(source, [7, 8, 9][: len(source)]) == copied
    if copied:
        lane = store.lanes.find([7, 8, 9], copied * BLOCK_SIZE)
        assert store.contents[lane, : copied * BLOCK_SIZE : BLOCK_SIZE].tolist() == names
    with pytest.raises(RuntimeError):
        store.lanes.find([7, 8, 9], copied * BLOCK_SIZE + 1)


def test_where_all_lanes_are_taken_a_copy_takes_none_of_its_sources():
    store = Store(count=2)
    store.step("one", [0], 0, BLOCK_SIZE)
    store.step("other", [1], 0, BLOCK_SIZE)
    assert store.lanes.copy([0], [2]) == 1
    assert store.holds("one")
    assert not store.holds("other")


def test_a_copy_that_has_nowhere_to_go_but_its_source_is_none():
    store = Store(count=1)
    store.step("one", [0], 0, BLOCK_SIZE)
    assert store.lanes.copy([0], [1]) == 0
    assert store.step("new", [1], 0) == 0


def test_a_first_block_that_begins_anew_begins_empty():
    store = Store()
    assert store.step("old", [3, 4], 0) == store.step("new", [3], 0)
    assert store.lanes.lengths[0] == 1


def test_kv_that_arrives_behind_other_kv_joins_it():
    store = Store()
    lane = store.lanes.receive([7, 8], range(20))
    assert store.lanes.receive([7, 8], range(20, 30)) == lane == store.lanes.find([7, 8], 30)
    assert store.lanes.lengths[lane] == 30


@pytest.mark.parametrize(("blocks", "tokens"), [([7, 9], 1), ([7, 8], 11), ([3], 1)])
def test_what_is_not_here_is_not_found(blocks, tokens):
    store = Store()
    store.lanes.receive([7, 8], range(10))
    with pytest.raises(RuntimeError, match=f"the KV of {tokens} tokens"):
        store.lanes.find(blocks, tokens)


@pytest.mark.parametrize("before", [[], [range(10)], [range(10), range(10, 14)]])
def test_kv_behind_a_gap_is_refused(before):
    store = Store()
    for tokens in before:
        store.lanes.receive([7, 8], tokens)
    with pytest.raises(RuntimeError, match="the KV of 15 tokens"):
        store.lanes.receive([7, 8], range(15, 20))


def test_a_sequence_whose_lane_was_taken_while_its_kv_came_gets_no_more_of_it():
    store = Store()
    store.lanes.receive([0], range(10))
    for block in range(1, COUNT + 1):  # one more than there are lanes
        store.step(f"other {block}", [block], 0)
    with pytest.raises(RuntimeError, match="the KV of 10 tokens"):
        store.lanes.receive([0], range(10, 20))


def test_a_sequence_that_was_moved_while_its_kv_came_goes_on():
    store = Store()
    lanes = [store.step(name, [i], 0) for i, name in enumerate("ab")]
    store.lanes.receive([9], range(10))
    store.lanes.step(np.array([0]), 0, 1)
    store.lanes.gather([lanes[0], store.lanes.find([9], 10)])
    store.lanes.receive([9], range(10, 20))
    store.step("sequence", [9], 20)


@given(st.lists(st.sets(st.integers(0, COUNT - 1), min_size=1), max_size=12), st.data())
def test_every_running_sequence_finds_its_own_kv(steps, data):
    """Also one that began with a copy of another's, which may have ended."""
    store, right = Store(4 * COUNT), [[] for _ in range(COUNT)]
    free, cached = list(range(BLOCKS)), []
    blocks = [[free.pop()] for _ in range(COUNT)]
    for number, members in enumerate(steps):
        for ended in data.draw(st.sets(st.sampled_from(sorted(members)))):
            if whole := len(right[ended]) // BLOCK_SIZE:
                cached.append((blocks[ended][:whole], right[ended][: whole * BLOCK_SIZE]))
            free = blocks[ended] + free if data.draw(st.booleans()) else free + blocks[ended]
            blocks[ended], right[ended] = [free.pop()], []
            cached = [(source, kv) for source, kv in cached if blocks[ended][0] not in source]
            source, kv = data.draw(st.sampled_from(cached)) if cached else ([], [])
            others = [block for block in free if block not in source][: len(source) - 1]
            if source and len(others) == len(source) - 1:
                copied = store.lanes.copy(source, blocks[ended] + others)
                blocks[ended] += others[: max(0, copied - 1)]
                right[ended] = kv[: copied * BLOCK_SIZE]
                free = [block for block in free if block not in blocks[ended]]
                cached = [(source, kv) for source, kv in cached if not set(source) & set(blocks[ended])]
        lanes = []
        for i in sorted(members):
            tokens = data.draw(st.integers(1, 3))
            past = len(right[i])
            while len(blocks[i]) * BLOCK_SIZE < past + tokens and free:
                blocks[i].append(free.pop())
            tokens = min(tokens, len(blocks[i]) * BLOCK_SIZE - past)
            if not tokens or past + tokens > LENGTH:
                continue
            cached = [(source, kv) for source, kv in cached if not set(source) & set(blocks[i])]
            lane = store.step(f"{number}.{i}", blocks[i], past, tokens)
            right[i] = right[i] + [f"{number}.{i}"] * tokens
            assert store.contents[lane, : len(right[i])].tolist() == right[i]
            lanes.append((i, lane))
        moved = store.lanes.gather([lane for _, lane in lanes]) if lanes else []
        if moved:
            assert sorted(moved) == list(range(min(moved), min(moved) + len(moved)))
        for (i, _), lane in zip(lanes, moved, strict=True):
            assert store.contents[lane, : len(right[i])].tolist() == right[i]
