"""What a user of the OpenVINO backend would miss: fused operations, faithful rounding, small memory, a free interpreter."""

import json
import math
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
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from penstock.backends.checkpoint import read_model
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.contract import DeviceConfig, DType, StepBatch, Unsupported
from penstock.backends.mapped_arrays import MappedArrays
from penstock.backends.openvino import REGISTRATION
from penstock.backends.openvino.graph import build
from penstock.backends.openvino.quantization import Groups, Rows, quantize_groups, quantize_rows
from penstock.backends.openvino.source import Source
from penstock.backends.openvino.weights import Constants
from penstock.backends.safetensors import Weights
from penstock.common.service import StartError


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


def compile_graph(spec, dtype):
    with Source(spec, DeviceConfig(threads=1), dtype) as source:
        return source.compile()[0]


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.INT8, DType.INT4])
def test_the_plugin_recognises_every_pattern(spec, dtype):
    compiled = compile_graph(spec, dtype)
    found = Counter(str(node.get_rt_info()["layerType"].value) for node in compiled.get_runtime_model().get_ordered_ops())
    layers = spec.decoder.layers
    assert found["RoPE"] == 2 * layers
    assert found["RMS"] == 4 * layers + 1
    assert found["PagedAttention"] == layers
    assert found["FullyConnected"] == 4 * layers + 1  # query, key and value are one; so are gate and up


@given(arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=40), elements=st.floats(-1e6, 1e6, width=32)))
def test_rounding_is_off_by_half_a_step_at_most(matrix):
    values, scales = out = Rows(np.empty(matrix.shape, np.int8), np.empty((len(matrix), 1), np.float32))
    with ThreadPoolExecutor(1) as pool:
        quantize_rows([matrix], out, pool)
    assert np.all(np.abs(values * scales.astype(np.float64) - matrix) <= scales * 0.5001)
    assert np.all(np.abs(values.astype(int)) <= 127)


MATRIX_OF_GROUPS = st.tuples(st.integers(1, 20), st.integers(1, 4).map(lambda groups: groups * 32))


@given(arrays(np.float32, MATRIX_OF_GROUPS, elements=st.floats(-1e6, 1e6, width=32)))
def test_rounding_to_4_bits_is_off_by_a_step_at_most_and_keeps_zeros(matrix):
    half, groups = len(matrix) // 2, (len(matrix), matrix.shape[1] // 32, 1)
    values, zeros, scales = out = Groups(
        np.empty((len(matrix), matrix.shape[1] // 2), np.uint8), np.empty(groups, np.uint8), np.empty(groups, np.float32)
    )
    with ThreadPoolExecutor(1) as pool:
        quantize_groups([matrix[:half], matrix[half:]] if half else [matrix], out, pool)
    unpacked = np.stack([values & 15, values >> 4], -1).reshape(len(matrix), -1, 32).astype(np.float64)
    found = ((unpacked - zeros) * scales).reshape(matrix.shape)
    steps = np.broadcast_to(scales, unpacked.shape).reshape(matrix.shape)
    assert np.all(np.abs(found - matrix) <= steps * 1.0001)  # half a step by the value, half by the zero point
    assert np.all(found[matrix == 0] == 0)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.INT8, DType.INT4])
@pytest.mark.usefixtures("without_bf16")
def test_the_plugin_keeps_weights_as_short_as_they_came(spec, dtype):
    compiled = compile_graph(spec, dtype)
    nodes = compiled.get_runtime_model().get_ordered_ops()
    products = [node for node in nodes if str(node.get_rt_info()["layerType"].value) == "FullyConnected"]
    types = Counter(product.input(1).get_element_type().to_string() for product in products)
    count = 4 * spec.decoder.layers
    expected = {DType.BF16: {"bf16": count + 1}, DType.INT8: {"i8": count + 1}, DType.INT4: {"u4": count, "i8": 1}}
    assert types == expected[dtype]  # the last one makes the logits


@pytest.mark.parametrize("dtype", [DType.BF16, DType.INT8, DType.INT4])
@pytest.mark.usefixtures("without_bf16")
def test_no_short_weight_is_of_a_shape_that_is_packed_twice(spec, dtype):
    nodes = compile_graph(spec, dtype).get_runtime_model().get_ordered_ops()
    shapes = [list(node.input(1).get_shape()) for node in nodes if str(node.get_rt_info()["layerType"].value) == "FullyConnected"]
    assert len(shapes) == 4 * spec.decoder.layers + 1
    # What oneDNN does from 7 to 80 tokens: a block of its own for weights of less than 16 MiB in float32, in whole blocks of 32.
    assert [shape for shape in shapes if shape[0] % 32 == 0 and 4 * math.prod(shape) < 16 << 20] == []


def test_shorter_types_agree_with_float32(spec):
    batch = prompt_batch(np.random.default_rng(0).integers(0, 320, 40))
    exact = create(spec, DType.F32).step(batch).logits.copy()
    for dtype, tolerance in ((DType.BF16, 0.05), (DType.INT8, 0.1), (DType.INT4, 0.25)):
        logits = create(spec, dtype).step(batch).logits
        assert np.linalg.norm(logits - exact) <= tolerance * np.linalg.norm(exact)


@pytest.mark.parametrize("has_bf16", [True, False])
def test_weights_of_a_bfloat16_checkpoint_are_taken_as_they_are(tmp_path, has_bf16):
    spec = write_checkpoint(tmp_path, {**CONFIGS["llama"], "vocab_size": 321})  # a number of rows that needs no spare ones
    shorten(spec.shards[0])
    spec = read_model(tmp_path, "short")
    with Weights(spec) as weights, MappedArrays(tmp_path) as arrays:
        constants = Constants(weights, arrays, DType.BF16, threads=1, has_bf16=has_bf16)
        build(spec.decoder, constants)
        names = spec.decoder.weights
        small = [name.format(layer=0) for name in (names.layer.o, names.layer.down)] if has_bf16 else []
        for name in (names.lm_head or names.embedding, *small):
            assert any(np.shares_memory(held, weights[name]) for held in constants.held)
    assert create(spec, DType.BF16).step(prompt_batch([1, 2, 3])).logits.shape == (3, 321)


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


@pytest.mark.parametrize("dtype", [DType.INT8, DType.INT4])
def test_a_second_start_finds_the_rounded_weights(spec, tmp_path, dtype):
    batch, cache = prompt_batch(range(40)), tmp_path / "cache"
    first = create(spec, dtype, weight_cache=cache).step(batch).logits.copy()
    (kept,) = (cache / "openvino").iterdir()
    before = kept.stat().st_mtime_ns
    np.testing.assert_array_equal(create(spec, dtype, weight_cache=cache).step(batch).logits, first)
    assert kept.stat().st_mtime_ns == before
    write_checkpoint(tmp_path, CONFIGS["qwen3"], seed=1)  # other weights in the same place
    assert not np.array_equal(create(read_model(tmp_path, "m"), dtype, weight_cache=cache).step(batch).logits, first)


def test_weights_that_were_kept_in_another_form_under_the_same_name_are_rounded_anew(spec, tmp_path, monkeypatch):
    batch = prompt_batch(range(40))
    with monkeypatch.context() as earlier:
        earlier.setattr("penstock.backends.openvino.quantization._GROUP_SIZES", (32,))
        create(spec, DType.INT4, weight_cache=tmp_path)
    again = create(spec, DType.INT4, weight_cache=tmp_path).step(batch).logits
    np.testing.assert_array_equal(again, create(spec, DType.INT4).step(batch).logits)
    assert len(list(tmp_path.rglob("*.arrays"))) == 1


CODE_AND_BUFFERS = 64 << 20  # of the plug-in's products; a second copy of these weights would be more than is left of it
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "vocab_size": 16384}
LOAD = """
import sys
from pathlib import Path
from penstock.backends.checkpoint import read_model
from penstock.backends.contract import DeviceConfig, DType
from penstock.backends.openvino import REGISTRATION

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))

for folder in sys.argv[2:]:  # the small one first: what the runtime itself takes
    model = REGISTRATION.create(read_model(Path(folder), "m"), DeviceConfig(dtype=DType(sys.argv[1]), threads=1, kv_cache_bytes=1 << 22))
    print(peak() << 10)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """65 million weights."""
    return write_checkpoint(tmp_path_factory.mktemp("large"), {**CONFIGS["qwen3"], **SIZES, "head_dim": 64})


@pytest.mark.parametrize(("dtype", "weight_bytes"), [(DType.F32, 4.0), (DType.BF16, 2.0), (DType.INT8, 1.0)])
def test_a_start_takes_no_second_copy_of_the_weights(spec, large, dtype, weight_bytes):
    command = [sys.executable, "-c", LOAD, dtype, str(spec.folder), str(large.folder)]
    small, peak = map(int, subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout.split())
    shapes = large.decoder.weight_shapes()
    names = [name for name in shapes if name != large.decoder.weights.embedding]
    served = sum(math.prod(shapes[name]) for name in names) * weight_bytes
    assert peak - small <= 1.3 * served + CODE_AND_BUFFERS


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
    # What OpenVINO tells goes out by this module alone, and from a thread that no test could wait for.
    program = "import sys, penstock.backends.openvino.model, openvino; print(sys.modules['openvino_telemetry'])"
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "None\n"
    assert list(tmp_path.iterdir()) == []
