"""What a user of the ONNX Runtime backend would miss: fused operators, faithful rounding, memory that is given back."""

import mmap
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from penstock.backends.apart.model import ModelApart
from penstock.backends.conformance import CHECKS, subjects
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.driver import NONE, Driver, Piece
from penstock.backends.contract import DeviceConfig, DType, Unavailable, Unsupported
from penstock.backends.mapped_arrays import MappedArrays
from penstock.backends.onnxruntime import REGISTRATION, registration
from penstock.backends.onnxruntime import session as session_module
from penstock.backends.onnxruntime import weights as weights_module
from penstock.backends.onnxruntime.cache import LaneCache
from penstock.backends.onnxruntime.graph import build
from penstock.backends.onnxruntime.weights import WeightSource, quantize_blocks
from penstock.backends.safetensors import Weights
from penstock.common.service import StartError


@pytest.fixture
def spec(tmp_path):
    return write_checkpoint(tmp_path, CONFIGS["qwen3"])


@pytest.fixture
def create(spec):
    made = []

    def make(dtype=DType.F32, **settings):
        settings = {"kv_cache_bytes": 1 << 22, "threads": 1} | settings
        made.append(REGISTRATION.create(spec, DeviceConfig(dtype=dtype, **settings)))
        return made[-1]

    yield make
    for model in made:
        model.close()


@pytest.mark.parametrize(
    ("dtype", "product"), [(DType.F32, "FusedMatMul"), (DType.INT8, "MatMulNBits"), (DType.INT4, "MatMulNBits")]
)
def test_each_layer_is_a_dozen_operators(spec, dtype, product, tmp_path):
    with Weights(spec) as weights, MappedArrays(tmp_path) as memory:
        graph = build(spec.decoder, WeightSource(weights, dtype, 1, memory), 512).graph
        found = Counter(node.op_type for node in graph)
    layers = spec.decoder.layers
    assert found[product] == 4 * layers + 1  # query, key and value are one; so are gate and up
    assert found["GroupQueryAttention"] == layers
    assert found["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert not any(value.const_value.nbytes for value in graph.initializers.values() if value.name not in weights_of(graph))


def weights_of(graph):
    """Initialisers that a session is handed, and small constants of shapes."""
    return {
        name for name, v in graph.initializers.items() if type(v.const_value).__name__ == "ExternalTensor" or v.const_value.size < 9
    }


@pytest.mark.parametrize("bits", [4, 8])
@given(matrix=arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-1e6, 1e6, width=32)))
def test_rounding_is_off_by_a_step_at_most(bits, matrix):
    blocks = -(-matrix.shape[1] // 16)
    values, scales = np.empty((len(matrix), blocks, 2 * bits), np.uint8), np.empty((len(matrix), blocks), np.float32)
    with ThreadPoolExecutor(1) as pool:
        quantize_blocks(matrix, bits, values, scales, pool)
    whole = values if bits == 8 else np.stack([values & 15, values >> 4], -1)
    shifted = whole.reshape(*scales.shape, 16).astype(np.float64) - (1 << (bits - 1))
    back = (shifted * scales[..., None]).reshape(len(matrix), -1)[:, : matrix.shape[1]]
    step = np.repeat(np.abs(scales), 16, axis=1)[:, : matrix.shape[1]]
    assert np.all(np.abs(back - matrix) <= step * 1.0001)  # by half a step, but for what would have to be 2^(bits - 1)


def test_rounded_weights_are_kept_for_the_next_start(create, tmp_path):
    ids = list(range(20))
    first = Driver(create(DType.INT4, weight_cache=tmp_path / "kept")).prefill(ids)[1]
    (kept,) = (tmp_path / "kept").rglob("*.arrays")
    written = kept.stat().st_mtime_ns
    np.testing.assert_array_equal(Driver(create(DType.INT4, weight_cache=tmp_path / "kept")).prefill(ids)[1], first)
    assert kept.stat().st_mtime_ns == written


def test_weights_that_an_earlier_version_has_kept_in_another_form_are_rounded_anew(create, tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(weights_module, "BLOCKS", {8: 16, 4: 16})
        earlier.setattr(session_module, "FORM", "16")
        create(DType.INT4, weight_cache=tmp_path)
    model = create(DType.INT4, weight_cache=tmp_path)
    np.testing.assert_array_equal(Driver(model).prefill([1, 2, 3])[1], Driver(create(DType.INT4)).prefill([1, 2, 3])[1])
    assert len(list(tmp_path.rglob("*.arrays"))) == 2


def test_weights_that_were_kept_in_another_form_under_the_same_name_are_rounded_anew(create, tmp_path, monkeypatch):
    with monkeypatch.context() as earlier:
        earlier.setattr(weights_module, "BLOCKS", {8: 16, 4: 16})
        create(DType.INT4, weight_cache=tmp_path)
    model = create(DType.INT4, weight_cache=tmp_path)
    np.testing.assert_array_equal(Driver(model).prefill([1, 2, 3])[1], Driver(create(DType.INT4)).prefill([1, 2, 3])[1])
    (kept,) = tmp_path.rglob("*.arrays")
    written = kept.stat().st_mtime_ns
    create(DType.INT4, weight_cache=tmp_path)
    assert kept.stat().st_mtime_ns == written


def test_a_device_that_it_has_not_is_refused(create):
    with pytest.raises(StartError, match="on cpu alone, not on cuda:0"):
        create(device="cuda:0")


def test_a_cache_in_a_type_that_it_has_not_is_refused(create):
    with pytest.raises(StartError, match="no KV cache of int8"):
        create(kv_cache_dtype=DType.INT8)


def test_shorter_types_agree_with_float32(create):
    ids = np.random.default_rng(0).integers(0, 320, 40).tolist()
    exact = Driver(create()).prefill(ids)[1]
    for dtype, tolerance in ((DType.INT8, 0.05), (DType.INT4, 0.4)):
        logits = Driver(create(dtype)).prefill(ids)[1]
        assert np.linalg.norm(logits - exact) <= tolerance * np.linalg.norm(exact)


def test_a_lane_takes_the_memory_of_what_it_holds_and_gives_it_back(spec):
    decoder = replace(spec.decoder, layers=1, kv_heads=8, head_dim=128, context_length=1 << 20)
    cache = LaneCache(decoder, blocks=512, lanes=64, context=decoder.context_length)  # half a TiB, were it all taken
    before = resident()
    lane = cache.lanes.step(np.arange(256, dtype=np.int32), 0, 8192)
    for array in cache.memory.arrays.values():
        array[lane, :, :8192] = 1
    taken = resident() - before
    assert 60 << 20 < taken < 80 << 20  # 8,192 tokens of 8 KiB
    cache.lanes.step(np.array([128], np.int32), 0, 1)  # another sequence has one of its blocks now
    assert taken - (40 << 20) < resident() - before < taken - (30 << 20)
    cache.lanes.step(np.array([0], np.int32), 0, 1)
    assert resident() - before < taken - (60 << 20)


def resident():
    return psutil.Process().memory_info().rss


def test_a_past_that_is_not_there_is_an_error_and_not_an_answer(create):
    driver = Driver(create())
    stranger = driver.sequence()
    driver.extend(stranger, 5)
    stranger.length = 5
    with pytest.raises(RuntimeError, match="the KV of 5 tokens"):
        driver.step(Piece(stranger, [1]))


def test_sequences_that_end_out_of_order_leave_the_others_right(create):
    model = create()
    driver, random = Driver(model), np.random.default_rng(0)
    prompts = [random.integers(0, 320, 20 + i).tolist() for i in range(6)]
    alone = {}
    for i, ids in enumerate(prompts):
        sequence, _ = driver.prefill(ids)
        alone[i] = [driver.step(Piece(sequence, [t]))[0] for t in (5, 6, 7)]
        driver.release(sequence)
    running = {i: driver.sequence() for i in range(6)}
    for i, ids in enumerate(prompts):
        driver.step(Piece(running[i], ids, NONE))
    for step, left in enumerate([(0, 1, 2, 3, 4, 5), (0, 2, 5), (5, 0)]):
        found = driver.step(*(Piece(running[i], [5 + step]) for i in left))
        for i, logits in zip(left, found, strict=True):
            np.testing.assert_allclose(logits, alone[i][step], atol=1e-4)


def test_other_threads_run_during_a_step(create):
    driver = Driver(create(max_batch_tokens=512))
    stop, turns = threading.Event(), 0

    def count():
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(0)

    counter = threading.Thread(target=count)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # so that the other thread runs when the lock is given up, and not when a time slice ends
    try:
        counter.start()
        before = turns
        for _ in range(5):
            driver.release(driver.prefill([0] * 500)[0])
        during = turns - before
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        counter.join()
    assert during > 50


def test_a_partial_rotation_is_refused_with_its_dimensions(spec):
    decoder = spec.decoder
    partial = replace(spec, decoder=replace(decoder, rope=replace(decoder.rope, dim=decoder.head_dim // 2)))
    answer = REGISTRATION.capabilities(partial)
    assert isinstance(answer, Unsupported)
    assert "16 of 32" in answer.reason


def test_a_dtype_that_it_has_not_is_named(create):
    with pytest.raises(StartError, match="has no bf16, but f32, int8, int4"):
        create(DType.BF16)


def test_address_space_that_is_not_granted_is_said(spec, monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(StartError, match="lower max_context"):
        LaneCache(spec.decoder, blocks=8, lanes=8, context=512)


def test_a_missing_package_is_named_with_what_to_install(monkeypatch):
    monkeypatch.setattr(registration, "find_spec", lambda name: None if name == "onnx_ir" else object())
    answer = REGISTRATION.probe()
    assert isinstance(answer, Unavailable)
    assert answer.reason == "onnx_ir not installed; install penstock[onnxruntime]"


@pytest.mark.parametrize("check", ["cached_prefixes_stay_as_they_are", "prefixes_are_copied_as_far_as_they_are_there"])
def test_prefixes_are_copied_in_a_process_of_its_own_too(check, tmp_path):
    apart = replace(REGISTRATION, create=lambda spec, config: ModelApart("onnxruntime", spec, config))
    (subject,) = subjects(apart, tmp_path, families=("qwen3",))
    CHECKS[check](subject)


def test_ended_sequences_keep_their_lanes_as_far_as_address_space_goes(create, monkeypatch):
    def lanes(**settings):
        return len(create(max_batch_size=2, **settings)._cache.lanes.lengths)

    assert lanes(kv_cache_bytes=1 << 26) == 32
    assert lanes(kv_cache_bytes=1 << 19) == 8  # there are no more blocks
    monkeypatch.setattr("penstock.backends.onnxruntime.model._ADDRESS_SPACE", 0)
    assert lanes(kv_cache_bytes=1 << 26) == 4
