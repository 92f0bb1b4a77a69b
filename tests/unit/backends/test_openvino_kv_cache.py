"""The KV cache in 8 bits, and in float16: near what float32 gives, the same however a prompt came, and in the canonical form for other caches."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.driver import NONE, Driver, Piece
from penstock.backends.contract import CANONICAL_DTYPES, DeviceConfig, DType, KvChunk
from penstock.backends.openvino import REGISTRATION
from penstock.backends.openvino.kv_rounding import HEADER, round_to, unround
from penstock.backends.ranking import Speed
from penstock.common.service import StartError
from penstock.executor.config import ExecutorConfig
from penstock.executor.loading import load, prepare

TOKENS = 70
# Root-mean-square error of logits over their size; rounding weights to int8 is allowed ten times as much.
TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), CONFIGS["qwen3"])


def create(spec, kv=DType.INT8):
    return REGISTRATION.create(
        spec, DeviceConfig(dtype=DType.F32, kv_cache_dtype=kv, kv_cache_bytes=1 << 22, threads=1, max_batch_tokens=256)
    )


def ids(count, seed=0):
    return np.random.default_rng(seed).integers(0, 320, count).tolist()


def assert_near(found, right, tolerance=TOLERANCE):
    assert np.linalg.norm(found - right) <= tolerance * np.linalg.norm(right)


def follow(driver, sequence):
    return np.concatenate([driver.step(Piece(sequence, [token]))[0] for token in ids(6, 1)])


def test_logits_are_near_those_of_a_cache_in_float32(spec):
    exact, rounded = (Driver(create(spec, kv)) for kv in (None, DType.INT8))
    (before, right), (sequence, found) = exact.prefill(ids(TOKENS)), rounded.prefill(ids(TOKENS))
    assert_near(found, right)
    behind, right = follow(rounded, sequence), follow(exact, before)
    assert_near(behind, right)
    assert not np.array_equal(behind, right)  # it was rounded


def test_it_takes_less_than_a_third_of_float32(spec):
    exact, rounded = create(spec, None).kv, create(spec).kv
    assert (
        rounded.bytes_per_block <= 0.32 * exact.bytes_per_block
    )  # 8 bytes of 40 are scale and offset here; of 136, with real heads
    assert (rounded.dtype, exact.dtype) == ("u8", "f32")


def test_what_is_cached_does_not_depend_on_the_chunks(spec):
    model = create(spec)
    driver = Driver(model)
    chunks = [model.export_kv(driver.prefill(ids(TOKENS), chunk)[0].blocks, range(TOKENS)).data for chunk in (TOKENS, 1, 33)]
    steps = np.ptp(chunks[0], -1, keepdims=True) / 255
    for other in chunks[1:]:  # attention reads what is rounded, so that a prompt in chunks differs by that
        np.testing.assert_allclose(other[0], chunks[0][0], rtol=0, atol=1.01 * steps[0].max())
        assert_near(other, chunks[0])


def test_export_is_canonical_and_import_goes_both_ways(spec):
    exact, rounded = create(spec, None), create(spec)
    sequence, _ = Driver(exact).prefill(ids(TOKENS))
    whole = exact.export_kv(sequence.blocks, range(TOKENS))
    for source, target in ((exact, rounded), (rounded, exact)):
        (away, here) = Driver(source), Driver(target, list(reversed(range(target.kv.blocks))))
        sequence, _ = away.prefill(ids(TOKENS))
        chunk = source.export_kv(sequence.blocks, range(TOKENS))
        assert chunk.data.shape == whole.data.shape
        assert chunk.data.dtype == np.float32
        assert_near(chunk.data, whole.data)
        moved = here.sequence()
        here.extend(moved, TOKENS)
        target.import_kv(moved.blocks, chunk)
        moved.length = TOKENS
        assert_near(follow(here, moved), follow(away, sequence))


def test_a_prompt_without_logits_fills_it_too(spec):
    driver = Driver(create(spec))
    whole, other = driver.prefill(ids(TOKENS))[0], driver.sequence()
    driver.step(Piece(other, ids(TOKENS), NONE))
    np.testing.assert_array_equal(follow(driver, other), follow(driver, whole))


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=3, max_side=20), elements=st.floats(-1e4, 1e4, width=32)))
def test_rounding_is_off_by_half_a_step_at_most(exact):
    rows, found = np.empty((*exact.shape[:-1], exact.shape[-1] + HEADER), np.uint8), np.empty_like(exact)
    round_to(rows, exact)
    unround(rows, found)
    step = np.ptp(exact.astype(np.float64), -1, keepdims=True) / 255
    assert np.all(np.abs(found - exact) <= 0.51 * step + 1e-6 * np.abs(exact).max() + 1e-30)


@pytest.mark.parametrize("dtype", CANONICAL_DTYPES)
def test_kv_of_any_type_is_off_by_half_a_step_of_its_token_and_head_at_most(dtype, spec):
    model = create(spec)
    blocks, tokens, random = [5, 2, 7], range(11, 83), np.random.default_rng(0)
    shape = model.kv.canonical_shape(len(tokens))
    given = (random.standard_normal(shape) * 10 + random.normal(0, 100, (*shape[:-1], 1))).astype(CANONICAL_DTYPES[dtype])
    model.import_kv(blocks, KvChunk(tokens, given))
    found, right = model.export_kv(blocks, tokens).data, given.astype(np.float64)
    steps = np.ptp(right, -1, keepdims=True) / 255
    assert np.all(np.abs(found - right) <= 0.501 * steps + 1e-6 * np.abs(right))
    # What was rounded once is not rounded again: it goes to a cache of float32 and back by less than a hundredth of a step.
    model.import_kv([1, 6, 3], KvChunk(tokens, found))
    assert np.all(np.abs(model.export_kv([1, 6, 3], tokens).data - found) <= 0.01 * steps + 1e-6 * np.abs(right))


@pytest.mark.parametrize("dtype", [DType.BF16, DType.INT8, DType.INT4])
@pytest.mark.usefixtures("without_bf16")
def test_short_weights_have_a_cache_in_float16_where_the_processor_multiplies_no_bfloat16(spec, dtype):
    model = REGISTRATION.create(spec, DeviceConfig(dtype=dtype, kv_cache_bytes=1 << 22, threads=1, max_batch_tokens=256))
    assert (model.kv.dtype, model.kv.canonical_dtype) == ("f16", "float16")
    driver = Driver(model)
    sequence, _ = driver.prefill(ids(TOKENS))
    chunk = model.export_kv(sequence.blocks, range(TOKENS))
    moved = driver.sequence()
    driver.extend(moved, TOKENS)
    model.import_kv(moved.blocks, chunk)
    moved.length = TOKENS
    np.testing.assert_array_equal(follow(driver, moved), follow(driver, sequence))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.usefixtures("without_bf16")
def test_kv_beyond_the_range_of_float16_becomes_its_end_and_no_infinity(spec, dtype):
    model = REGISTRATION.create(spec, DeviceConfig(dtype=DType.INT8, kv_cache_bytes=1 << 22, threads=1))
    given = np.linspace(-1e5, 1e5, math.prod(model.kv.canonical_shape(3))).reshape(model.kv.canonical_shape(3))
    given = given.astype(CANONICAL_DTYPES[dtype])
    model.import_kv([0], KvChunk(range(3), given))
    right = given.astype(np.float32).clip(-65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(model.export_kv([0], range(3)).data, right)


def test_a_cache_that_a_backend_has_not_is_refused_by_name(spec):
    with pytest.raises(StartError, match="no KV cache of int4, but int8"):
        create(spec, DType.INT4)
    with pytest.raises(StartError, match="torch: has no KV cache of int8; leave kv_cache_dtype auto"):
        load(ExecutorConfig(model=str(spec.folder), backend="torch", dtype="f32", kv_cache_dtype="int8"))


def test_a_device_that_it_has_not_is_refused(spec):
    with pytest.raises(StartError, match="device: backend openvino runs on cpu alone, not on cuda:0"):
        REGISTRATION.create(spec, DeviceConfig(device="cuda:0"))


def test_an_executor_is_told_of_it(spec):
    loaded = load(ExecutorConfig(model=str(spec.folder), backend="openvino", kv_cache_dtype="int8", kv_cache_gib=0.01))
    try:
        assert loaded.model.kv.dtype == "u8"
    finally:
        loaded.engine.close()


def test_auto_takes_the_backend_that_has_it_though_another_is_faster(spec, monkeypatch):
    def faster(*_):
        return lambda report, _: Speed(1, 1, 1, 1, seconds=1.0 if report.name == "torch" else 9.0)

    monkeypatch.setattr("penstock.executor.loading.kept_speeds", faster)
    asked = ExecutorConfig(model=str(spec.folder), dtype="f32", kv_cache_gib=0.01)
    assert prepare(asked).selection.registration.name == "torch"
    assert prepare(replace(asked, kv_cache_dtype="int8")).selection.registration.name == "openvino"
