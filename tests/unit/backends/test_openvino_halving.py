"""Steps in OpenVINO that are computed in halves: where that is quicker, and with the same answers and cache."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.driver import Driver, Piece
from penstock.backends.contract import DeviceConfig, DType, StepBatch
from penstock.backends.openvino import REGISTRATION
from penstock.backends.openvino.halving import SIZES, decoding, halves, halves_are_quicker


class Ways:
    """Two ways whose runs take, by a clock of their own, what is given in turn; the last one again and again."""

    def __init__(self, **times):
        self.now, self.runs, self._times = 0.0, dict.fromkeys(times, 0), times

    def way(self, name):
        def run():
            times = self._times[name]
            self.now += times[min(self.runs[name], len(times) - 1)]
            self.runs[name] += 1

        return run

    def halves(self):
        return halves_are_quicker(self.way("whole"), self.way("halved"), lambda: self.now)


@pytest.mark.parametrize(("whole", "halved"), [([0.2], [0.1]), ([0.1], [0.2]), ([0.9, 0.1], [0.2]), ([0.2], [0.9, 0.1])])
def test_the_quicker_way_is_found_whatever_disturbs_a_run_of_it(whole, halved):
    assert Ways(whole=whole, halved=halved).halves() == (min(halved) < min(whole))


def test_a_slow_model_is_tried_once():
    ways = Ways(whole=[5.0], halved=[4.0])
    assert ways.halves()
    assert ways.runs == {"whole": 1, "halved": 1}


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


def answers(model, monkeypatch, lengths, *, halved):
    """Logits and KV of a step that brings each sequence so many tokens, and how many times the graph was run for it."""
    monkeypatch.setattr(model, "_halves", halved)
    driver, ids = Driver(model), np.random.default_rng(0).integers(0, 320, 200).tolist()
    sequences = [driver.prefill(ids[i : i + 30 + 5 * i])[0] for i in range(len(lengths))]
    compute, runs = model._compute, []
    monkeypatch.setattr(model, "_compute", lambda batch: runs.append(batch) or compute(batch))
    logits = driver.step(*(Piece(sequence, [i] * n) for i, (sequence, n) in enumerate(zip(sequences, lengths, strict=True))))
    monkeypatch.setattr(model, "_compute", compute)
    return [*logits, *(model.export_kv(s.blocks, range(s.length)).data for s in sequences)], len(runs)


@pytest.mark.parametrize("count", SIZES)
def test_halves_change_no_answer_and_no_cache(model, monkeypatch, count):
    plain, once = answers(model, monkeypatch, [1] * count, halved=False)
    found, twice = answers(model, monkeypatch, [1] * count, halved=True)
    assert (once, twice) == (1, 2)
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-3 * np.abs(other).max())


@pytest.mark.parametrize("lengths", [[1] * 4, [1] * 9, [1, 1, 2, 1, 1]])
def test_other_steps_are_not_halved(model, monkeypatch, lengths):
    assert answers(model, monkeypatch, lengths, halved=True)[1] == 1


def test_a_half_may_have_no_logits(model, monkeypatch):
    monkeypatch.setattr(model, "_halves", True)
    step = replace(decoding(6), logits_rows=np.array([4], np.int64))
    (found,) = np.array(model.step(step).logits)
    np.testing.assert_allclose(found, model._compute(decoding(6)).logits[4], rtol=0, atol=2e-3 * np.abs(found).max())
