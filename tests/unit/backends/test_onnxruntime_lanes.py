"""Which lane a sequence's KV is in: nobody's KV is lost to a move, and what nobody holds is given back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.backends.onnxruntime.lanes import Lanes

COUNT, BLOCKS = 6, 24


class Store:
    """Lanes whose contents are names."""

    def __init__(self):
        self.contents = [None] * COUNT
        self.lanes = Lanes(COUNT, BLOCKS, empty=self.empty, move=self.move, swap=self.swap)

    def empty(self, lane):
        self.contents[lane] = None

    def move(self, source, target, _):
        self.contents[target], self.contents[source] = self.contents[source], None

    def swap(self, one, other, _):
        self.contents[one], self.contents[other] = self.contents[other], self.contents[one]

    def step(self, name, blocks, past):
        lane = self.lanes.step(np.array(blocks, np.int32), past, past + 1)
        self.contents[lane] = name
        return lane


def test_sequences_side_by_side_stay_where_they_are():
    store = Store()
    lanes = [store.step(i, [i], 0) for i in range(4)]
    assert store.lanes.gather(lanes) == lanes == [0, 1, 2, 3]


def test_a_gap_is_closed_by_the_sequence_that_is_away_from_the_others():
    store = Store()
    lanes = [store.step(name, [i], 0) for i, name in enumerate("abcde")]
    moved = store.lanes.gather([lanes[i] for i in (0, 1, 3)])
    assert sorted(moved) == [0, 1, 2]
    assert [store.contents[lane] for lane in moved] == ["a", "b", "d"]
    assert "c" in store.contents  # it did not step, and is still somewhere


def test_a_sequence_whose_block_another_took_is_gone():
    store = Store()
    store.step("old", [3, 4], 0)
    store.step("new", [5, 4], 0)
    assert "old" not in store.contents
    with pytest.raises(RuntimeError, match="the KV of 1 tokens"):
        store.step("old", [3, 4], 1)


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
    store, tokens = Store(), [0] * COUNT
    free = list(range(BLOCKS))
    blocks = [[free.pop()] for _ in range(COUNT)]
    for members in steps:
        for ended in data.draw(st.sets(st.sampled_from(sorted(members)))):
            free += reversed(blocks[ended])
            blocks[ended], tokens[ended] = [free.pop()], 0
        lanes = []
        for i in sorted(members):
            if data.draw(st.booleans()) and free:
                blocks[i].append(free.pop())
            lane = store.lanes.step(np.array(blocks[i], np.int32), tokens[i], tokens[i] + 1)
            if tokens[i]:
                assert store.contents[lane] == i
            store.contents[lane] = i
            tokens[i] += 1
            lanes.append(lane)
        moved = store.lanes.gather(lanes)
        assert sorted(moved) == list(range(min(moved), min(moved) + len(moved)))
        assert [store.contents[lane] for lane in moved] == sorted(members)
