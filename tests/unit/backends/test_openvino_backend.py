"""What a user of the OpenVINO backend would miss: fused operations, faithful rounding, small memory, a free interpreter."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ml_dtypes
import numpy as np
import openvino as ov
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from penstock.backends.checkpoint import read_model
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.contract import DeviceConfig, DType, StepBatch, Unsupported
from penstock.backends.openvino import REGISTRATION
from penstock.backends.openvino.graph import build
from penstock.backends.openvino.properties import properties
from penstock.backends.openvino.quantization import quantize_groups, quantize_rows
from penstock.backends.openvino.weights import Constants
from penstock.backends.safetensors import Weights
from penstock.common.service import StartError

HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.fixture
def spec(tmp_path):
    return write_checkpoint(tmp_path, CONFIGS["qwen3"])


def create(spec, dtype, **settings):
    return REGISTRATION.create(spec, DeviceConfig(dtype=dtype, kv_cache_bytes=1 << 22, threads=1, **settings))


def prompt_batch(tokens):
    length = len(tokens)
    blocks = -(-length // 32)
    return StepBatch(
        token_ids=np.array(tokens, np.int64),
        positions=np.arange(length),
        past_lengths=np.zeros(1, np.int32),
        starts=np.array([0, length], np.int32),
        block_ids=np.arange(blocks, dtype=np.int32),
        block_starts=np.array([0, blocks], np.int32),
        logits_rows=np.arange(length),
    )


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.INT8, DType.INT4])
def test_the_plugin_recognises_every_pattern(spec, dtype):
    constants = Constants(Weights(spec), dtype, threads=1)
    graph = build(spec.decoder, constants)
    compiled = ov.Core().compile_model(graph, "CPU", properties(spec.decoder, dtype, 1, has_bf16=HAS_BF16))
    found = Counter(str(node.get_rt_info()["layerType"].value) for node in compiled.get_runtime_model().get_ordered_ops())
    layers = spec.decoder.layers
    assert found["RoPE"] == 2 * layers
    assert found["RMS"] == 4 * layers + 1
    assert found["PagedAttention"] == layers
    assert found["FullyConnected"] == 4 * layers + 1  # query, key and value are one; so are gate and up


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-1e6, 1e6, width=32)))
def test_rounding_is_off_by_half_a_step_at_most(matrix):
    with ThreadPoolExecutor(1) as pool:
        values, scales = quantize_rows([matrix], pool)
    assert np.all(np.abs(values * scales.astype(np.float64) - matrix) <= scales * 0.5001)
    assert np.all(np.abs(values.astype(int)) <= 127)


MATRIX_OF_GROUPS = st.tuples(st.integers(1, 20), st.integers(1, 4).map(lambda groups: groups * 32))


@given(arrays(np.float32, MATRIX_OF_GROUPS, elements=st.floats(-1e6, 1e6, width=32)))
def test_rounding_to_4_bits_is_off_by_a_step_at_most_and_keeps_zeros(matrix):
    half = len(matrix) // 2
    with ThreadPoolExecutor(1) as pool:
        values, zeros, scales = quantize_groups([matrix[:half], matrix[half:]] if half else [matrix], 32, pool)
    unpacked = np.stack([values & 15, values >> 4], -1).reshape(len(matrix), -1, 32).astype(np.float64)
    found = ((unpacked - zeros) * scales).reshape(matrix.shape)
    steps = np.broadcast_to(scales, unpacked.shape).reshape(matrix.shape)
    assert np.all(np.abs(found - matrix) <= steps * 1.0001)  # half a step by the value, half by the zero point
    assert np.all(found[matrix == 0] == 0)


@pytest.mark.parametrize("dtype", [DType.INT8, DType.INT4])
def test_the_plugin_keeps_weights_as_short_as_they_came(spec, dtype):
    with Weights(spec) as weights:
        constants = Constants(weights, dtype, threads=1)
        graph = build(spec.decoder, constants)
        compiled = ov.Core().compile_model(graph, "CPU", properties(spec.decoder, dtype, 1, has_bf16=HAS_BF16))
    nodes = compiled.get_runtime_model().get_ordered_ops()
    products = [node for node in nodes if str(node.get_rt_info()["layerType"].value) == "FullyConnected"]
    types = Counter(product.input(1).get_element_type().to_string() for product in products)
    count = 4 * spec.decoder.layers
    assert types == ({"i8": count + 1} if dtype is DType.INT8 else {"u4": count, "i8": 1})  # the last one makes the logits


def test_shorter_types_agree_with_float32(spec):
    batch = prompt_batch(np.random.default_rng(0).integers(0, 320, 40))
    exact = create(spec, DType.F32).step(batch).logits.copy()
    for dtype, tolerance in ((DType.BF16, 0.05), (DType.INT8, 0.1), (DType.INT4, 0.25)):
        logits = create(spec, dtype).step(batch).logits
        assert np.linalg.norm(logits - exact) <= tolerance * np.linalg.norm(exact)


def test_weights_of_a_bfloat16_checkpoint_are_taken_as_they_are(tmp_path):
    spec = write_checkpoint(tmp_path, CONFIGS["llama"])
    shorten(spec.shards[0])
    spec = read_model(tmp_path, "short")
    with Weights(spec) as weights:
        constants = Constants(weights, DType.BF16, threads=1)
        build(spec.decoder, constants)
        names = spec.decoder.weights.layer
        for name in (names.o, names.down):
            assert any(np.shares_memory(held, weights[name.format(layer=0)]) for held in constants.held)
    assert create(spec, DType.BF16).step(prompt_batch([1, 2, 3])).logits.shape == (3, 320)


def shorten(path):
    """Write a float32 file's tensors again in bfloat16."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    short = np.frombuffer(body, np.float32).astype(ml_dtypes.bfloat16).tobytes()
    for entry in header.values():
        entry |= {"dtype": "BF16", "data_offsets": [offset // 2 for offset in entry["data_offsets"]]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + short)


def test_other_threads_run_during_a_step(spec):
    model = create(spec, DType.F32)
    batch = prompt_batch(np.zeros(512, np.int64))
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
            model.step(batch)
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


def test_a_dtype_that_it_has_not_is_named(spec):
    with pytest.raises(StartError, match="has no int2, but bf16, int8, int4, f32"):
        create(spec, "int2")


def test_a_closed_model_says_so(spec):
    model = create(spec, DType.F32)
    model.close()
    with pytest.raises(RuntimeError, match="closed"):
        model.step(prompt_batch([1]))


def test_nothing_is_told_to_anybody_and_nothing_is_written_into_the_home(tmp_path):
    program = "import socket; socket.create_connection = lambda *a, **k: print('calls', a); import penstock.backends.openvino.model, time; time.sleep(0.2)"
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
