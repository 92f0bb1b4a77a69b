"""Steps in OpenVINO that are computed in halves: where that is quicker, and with the same answers and cache."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.driver import Driver, Piece
from penstock.backends.contract import DeviceConfig, DType, StepBatch
from penstock.backends.openvino import REGISTRATION
from penstock.backends.openvino.halving import SIZES, Halving, halves


def taken(times, steps, size=8):
    """Whether each of so many steps is computed in halves, which take `times[True]`, and whole `times[False]`."""
    halving, ways = Halving(), []
    for _ in range(steps):
        halved = halving.wanted(size)
        ways.append(halved)
        halving.took(size, times[halved], halved=halved)
    return ways


@pytest.mark.parametrize(("whole", "halved", "better"), [(2.0, 1.0, True), (1.0, 2.0, False)])
def test_both_ways_are_tried_and_the_quicker_one_stays(whole, halved, better):
    ways = taken({False: whole, True: halved}, 100)
    assert ways[:8] == [False, True] * 4
    assert ways[8:] == [better] * 92


def test_each_size_has_a_choice_of_its_own_and_a_disturbed_step_does_not_decide_it():
    halving = Halving()
    for whole, halved in ((1.0, 9.0), (9.0, 0.5), (1.0, 9.0), (1.0, 9.0)):
        halving.took(6, whole, halved=False)
        halving.took(6, halved, halved=True)
    assert halving.wanted(6)
    assert not halving.wanted(7)


@given(st.lists(st.integers(1, 4), min_size=5, max_size=8), st.data())
def test_halves_hold_what_the_whole_does(blocks, data):
    count = len(blocks)
    rows = data.draw(st.sets(st.integers(0, count - 1)))
    ends = np.cumsum([0, *blocks])
    whole = StepBatch(
        token_ids=np.arange(count) + 100,
        positions=np.arange(count) + 40,
        past_lengths=np.arange(count, dtype=np.int32) + 40,
        starts=np.arange(count + 1, dtype=np.int32),
        block_ids=np.arange(ends[-1], dtype=np.int32)[::-1],
        block_starts=ends.astype(np.int32),
        logits_rows=np.array(sorted(rows), np.int64),
    )
    found = [], []
    for half in halves(whole):
        assert len(half.token_ids) in {count // 2, -(-count // 2)}
        assert half.starts.tolist() == list(range(len(half.token_ids) + 1))
        for i in range(len(half.token_ids)):
            held = half.block_ids[half.block_starts[i] : half.block_starts[i + 1]].tolist()
            found[0].append((half.token_ids[i], half.positions[i], half.past_lengths[i], held))
        found[1].extend(half.token_ids[half.logits_rows].tolist())
    for i, one in enumerate(found[0]):
        assert one == (100 + i, 40 + i, 40 + i, whole.block_ids[ends[i] : ends[i + 1]].tolist())
    assert found[1] == [100 + row for row in sorted(rows)]


@pytest.fixture
def model(without_bf16, tmp_path):
    spec = write_checkpoint(tmp_path, CONFIGS["qwen3"])
    made = REGISTRATION.create(spec, DeviceConfig(dtype=DType.INT8, kv_cache_bytes=1 << 22, threads=1))
    yield made
    made.close()


def answers(model, monkeypatch, count, *, halved):
    """Logits and KV of a step that brings each of `count` sequences a token."""
    monkeypatch.setattr(Halving, "wanted", lambda self, size: halved)
    driver, ids = Driver(model), np.random.default_rng(0).integers(0, 320, 200).tolist()
    sequences = [driver.prefill(ids[i : i + 30 + 5 * i])[0] for i in range(count)]
    logits = np.concatenate(driver.step(*(Piece(sequence, [i]) for i, sequence in enumerate(sequences))))
    return logits, [model.export_kv(s.blocks, range(s.length)).data for s in sequences]


@pytest.mark.parametrize("count", SIZES)
def test_halves_change_no_answer_and_no_cache(model, monkeypatch, count):
    plain, kv = answers(model, monkeypatch, count, halved=False)
    found, other_kv = answers(model, monkeypatch, count, halved=True)
    assert found.shape == plain.shape
    for one, other in zip((*found, *other_kv), (*plain, *kv), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-3 * np.abs(other).max())
