from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from penstock.backends.contract import KvSpec
from penstock.common.step_times import Curve, StepTimes
from penstock.executor import tuning
from penstock.executor.calibration import Shape, measure
from penstock.executor.config import ExecutorConfig
from penstock.executor.loading import load
from penstock.executor.token_budget import LEAST_RATE, TARGET_STEPS, TokenBudget, fit

SHAPE = Shape(max_batch_size=64, max_batch_tokens=2048, context_length=4096)


class Timed:
    """A model without results whose steps take, by a clock of its own, what a law says; and where it was written to or read."""

    def __init__(self, blocks=1024, device="cpu", scale=1.0, disturbed=(), import_seconds=0.0):
        self.kv = KvSpec(16, blocks, 1, "any", "any", (1, 1, 1))
        self.device = device
        self.now = 0.0
        self.batches = []
        self._scale = scale
        self._disturbed = set(disturbed)
        self._import_seconds = import_seconds

    def clock(self):
        return self.now

    @staticmethod
    def seconds(tokens, pairs, context):
        return max(0.010, 0.001 * tokens) + 1e-7 * pairs + 1e-6 * context

    def import_kv(self, blocks, chunk):
        assert len(blocks) * self.kv.block_size >= chunk.tokens.stop
        assert 0 <= min(blocks) <= max(blocks) < self.kv.blocks
        assert chunk.data.shape == self.kv.canonical_shape(len(chunk.tokens))
        self.now += self._import_seconds

    def step(self, batch):
        counts = np.diff(batch.starts)
        decoding = counts.max() == 1
        pairs = 0 if decoding else int((counts * batch.past_lengths).sum())
        context = int((batch.past_lengths + 1).sum()) if decoding else 0
        took = self._scale * self.seconds(int(counts.sum()), pairs, context)
        self.now += took * (10 if len(self.batches) in self._disturbed else 1)
        self.batches.append(batch)
        return SimpleNamespace(logits=None)


def test_step_times_of_a_model_are_found():
    model = Timed(scale=0.1)
    times = measure(model, SHAPE, 3.0, model.clock)
    assert times.decode.sizes == (1, 2, 4, 8, 16, 32, 64)
    for batch, context in ((1, 16), (64, 16), (8, 512), (24, 100)):
        assert times.step_seconds(batch, context) == pytest.approx(0.1 * Timed.seconds(batch, 0, batch * context), rel=0.05)
    for tokens, past in ((16, 0), (64, 0), (64, 1000), (300, 0)):
        steps = [(min(times.prefill.sizes[-1], tokens - i), past + i) for i in range(0, tokens, times.prefill.sizes[-1])]
        assert times.prefill_seconds(tokens, past) == pytest.approx(
            sum(0.1 * Timed.seconds(n, n * p, 0) for n, p in steps), rel=0.15
        )


def test_context_of_a_slow_model_is_found_where_it_can_be_imported():
    def most_context(imports):
        model = Timed(scale=20)
        times = measure(model, replace(SHAPE, imports=imports), 3.0, model.clock)
        decoding = [b.past_lengths.sum() for b in model.batches if np.diff(b.starts).max() == 1]
        return max(decoding), times.decode_token_seconds

    assert most_context(imports=False)[0] < 1000
    context, seconds = most_context(imports=True)
    assert context >= 2000
    assert seconds == pytest.approx(2e-5)


def test_imports_that_take_long_leave_prefill_its_share():
    model = Timed(scale=4, import_seconds=0.05)
    times = measure(model, replace(SHAPE, imports=True), 3.0, model.clock)
    assert times.prefill.sizes[-1] >= 64
    assert times.decode_token_seconds == pytest.approx(4e-6)


def test_batches_are_what_the_contract_asks_for():
    shapes = (SHAPE, replace(SHAPE, imports=True))
    for model, shape in product((Timed(), Timed(device="cuda:0"), Timed(blocks=5), Timed(blocks=1)), shapes):
        model.batches = []
        measure(model, shape, 3.0, model.clock)
        for batch in model.batches:
            assert len(set(batch.block_ids.tolist())) == len(batch.block_ids)
            assert 0 <= batch.block_ids.min() <= batch.block_ids.max() < model.kv.blocks
            counts, held = np.diff(batch.starts), np.diff(batch.block_starts)
            assert (held == -(-(batch.past_lengths + counts) // 16)).all()
            assert (batch.past_lengths + counts <= SHAPE.context_length).all()
            assert counts.sum() <= SHAPE.max_batch_tokens
            assert len(counts) <= SHAPE.max_batch_size
            expected = [p + i for p, n in zip(batch.past_lengths, counts, strict=True) for i in range(n)]
            assert batch.positions.tolist() == expected
            assert batch.logits_rows.tolist() == (batch.starts[1:] - 1).tolist()


@given(st.floats(0.001, 100), st.floats(0.5, 10))
def test_a_slow_model_is_measured_less_and_the_budget_kept(scale, budget):
    model = Timed(scale=scale)
    times = measure(model, SHAPE, budget, model.clock)
    # Beside the budget: the smallest step of decoding and of prefill, each of which is needed and may be tried again.
    needed = 3 * scale * (Timed.seconds(1, 0, 16) + Timed.seconds(16, 0, 0))
    assert model.now <= 1.1 * budget + needed
    assert times.prefill.sizes[0] == 16
    assert times.decode.sizes[0] == 1


def test_a_disturbed_step_is_tried_again():
    quiet, noisy = Timed(scale=0.1), Timed(scale=0.1, disturbed={7, 20, 33, 44})
    expected, found = measure(quiet, SHAPE, 3.0, quiet.clock), measure(noisy, SHAPE, 3.0, noisy.clock)
    assert found.decode.seconds == pytest.approx(expected.decode.seconds)
    shared = min(len(found.prefill.sizes), len(expected.prefill.sizes))
    assert found.prefill.seconds[:shared] == pytest.approx(expected.prefill.seconds[:shared])


def test_prompts_that_come_whole_are_measured_without_anything_before_them():
    model = Timed()
    measure(model, Shape(max_batch_size=4, max_batch_tokens=512, context_length=512, chunked=False), 3.0, model.clock)
    assert not any(np.diff(b.starts).max() > 1 and b.past_lengths.any() for b in model.batches)


def like(base, rate, decode_slope=0.0):
    """Steps that take `base` seconds at least, and prefill that is never faster than `rate`."""
    sizes = (16, 32, 64, 128, 256, 512, 1024, 2048)
    return StepTimes(
        prefill=Curve(sizes, tuple(base + n / rate for n in sizes)),
        prefill_pair_seconds=0.0,
        decode=Curve((1, 64), (base, base + 64 * decode_slope)),
        decode_context=16,
        decode_token_seconds=0.0,
    )


@given(st.floats(1e-4, 1.0), st.floats(100, 1e6), st.floats(0, 0.01), st.one_of(st.none(), st.floats(1e-4, 10)))
def test_chunk_keeps_the_target_and_the_speed_of_prefill(base, rate, slope, target):
    times = like(base, rate, slope)
    budget = fit(times, TokenBudget(512, 2048), 64, target)
    chunk = budget.prefill_chunk
    assert 16 <= chunk <= 512
    assert 64 < budget.max_batch_tokens <= 2048
    limit = TARGET_STEPS * times.step_seconds(64, 1024) if target is None else target
    if target is not None:
        assert times.chunk_seconds(chunk) <= limit or chunk == 16
    elif times.chunk_seconds(chunk) > limit and chunk > 16:
        assert (chunk - 16) / times.chunk_seconds(chunk - 16) < LEAST_RATE * times.prefill_tokens_per_second
    if times.chunk_seconds(512) <= limit:
        assert chunk == 512


def test_a_chunk_is_the_largest_within_the_operators_target():
    times = like(0.01, 1000)
    assert fit(times, TokenBudget(512, 2048), 64, 0.107).prefill_chunk == 96
    assert fit(times, TokenBudget(512, 2048), 64, 0.001).prefill_chunk == 16
    assert fit(times, TokenBudget(512, 2048), 64, 99).prefill_chunk == 512


def test_a_step_without_decodes_holds_no_more_than_keeps_the_device_busy():
    assert fit(like(0.01, 1000), TokenBudget(128, 2048), 8).max_batch_tokens < 512
    assert fit(like(0.1, 10_000), TokenBudget(128, 2048), 8).max_batch_tokens > 1500


@pytest.fixture(autouse=True)
def tell_only_the_worst_disturbances(monkeypatch):
    """The fake backend's steps are so short that a busy machine stretches some of them many times."""
    monkeypatch.setattr(tuning, "_DISTURBED", 1000)


def loaded(tmp_path, **settings):
    return load(ExecutorConfig(**{"backend": "fake", "cache_folder": str(tmp_path), "calibration_seconds": 0.2} | settings))


def events(logs):
    return [line["event"] for line in logs if "calibrat" in line["event"]]


def test_second_start_measures_nothing_and_steps_as_the_first(tmp_path):
    with capture_logs() as logs:
        first, second = loaded(tmp_path), loaded(tmp_path)
    assert events(logs) == ["calibrated"]
    assert second.times == first.times is not None
    assert second.engine.planner.limits == first.engine.planner.limits


def test_corrupt_cache_is_measured_again_and_replaced(tmp_path):
    first = loaded(tmp_path)
    (file,) = (tmp_path / "calibrations").iterdir()
    file.write_bytes(file.read_bytes()[:40])
    with capture_logs() as logs:
        assert loaded(tmp_path).times is not None
        loaded(tmp_path)
    # The choice of a backend looks at what was kept as well, and tells it too.
    *unreadable, last = events(logs)
    assert set(unreadable) == {"unreadable calibration ignored"}
    assert last == "calibrated"
    assert first.times is not None


def test_measurement_that_was_disturbed_is_made_anew(tmp_path):
    first = loaded(tmp_path)
    (file,) = (tmp_path / "calibrations").iterdir()
    text = file.read_text()
    slow = first.times.decode.seconds
    file.write_text(text.replace(str(list(slow)), str([s + 10 for s in slow])))
    with capture_logs() as logs:
        loaded(tmp_path)
    assert events(logs) == ["calibration made anew: the kept one was disturbed", "calibrated"]


def test_measuring_and_keeping_can_be_turned_off(tmp_path):
    off = loaded(tmp_path, calibration_seconds=0)
    limits = off.engine.planner.limits
    assert (off.times, limits.max_batch_tokens, limits.prefill_chunk) == (None, 2048, 512)
    assert loaded(tmp_path, calibration_cache=False).times is not None
    assert not (tmp_path / "calibrations").exists()


def test_what_the_operator_gives_wins(tmp_path):
    limits = loaded(tmp_path, max_batch_tokens=1000, prefill_chunk=333).engine.planner.limits
    assert (limits.max_batch_tokens, limits.prefill_chunk) == (1000, 333)
    limits = loaded(tmp_path, itl_target_ms=1e6).engine.planner.limits
    assert limits.prefill_chunk == 512
    with capture_logs() as logs:
        assert loaded(tmp_path, itl_target_ms=1e-6 + 1).engine.planner.limits.prefill_chunk >= 16
    assert all(line["event"] != "calibrated" for line in logs)


def test_nothing_of_a_measurement_is_taken_for_a_cached_prefix(tmp_path):
    engine = loaded(tmp_path).engine
    counts = engine.blocks.counts()
    assert (counts.used, counts.cached) == (0, 0)
    assert engine.meter.steps == 0
