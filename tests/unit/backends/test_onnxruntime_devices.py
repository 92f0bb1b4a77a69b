"""ONNX Runtime on accelerators: which are used, why others are not, and the way to compute there, taken here on the CPU."""

import json
import subprocess
from functools import partial

import numpy as np
import onnxruntime as ort
import pytest
from allocated_lanes import DEVICE, ON_DEVICE, create

from penstock.backends.conformance import CHECKS, NotApplicable, subjects
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.driver import NONE, Driver, Piece
from penstock.backends.contract import Available, DeviceConfig, DType
from penstock.backends.onnxruntime import REGISTRATION, accelerators, registration
from penstock.backends.onnxruntime.accelerators import Proof, read
from penstock.backends.onnxruntime.providers import HOST, PROVIDERS, Target
from penstock.backends.onnxruntime.proving import decode, prove, small_decoder
from penstock.common.service import StartError

NAMED = ort.get_available_providers()

# Threads are the runtime's, as in the other way.
LEFT_OUT = {"eight_models_run_at_once", "eight_threads_share_a_model"}
OF_NUMBERS = {
    "prompt_agrees_with_the_formulas",
    "chunks_agree_with_the_whole",
    "mixed_batch_agrees_with_each_alone",
    "exported_kv_is_canonical",
    "imported_kv_is_used",
    "kv_travels_in_every_type",
    "it_keeps_within_its_memory",
}
CASES = [
    *[("qwen3", DType.F32, check) for check in CHECKS if check not in LEFT_OUT],
    *[("llama", DType.F32, check) for check in sorted(OF_NUMBERS)],
    *[("llama", DType.INT8, check) for check in sorted(OF_NUMBERS)],
    *[("qwen3", DType.INT4, check) for check in sorted(OF_NUMBERS)],
]


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return small_decoder(tmp_path_factory.mktemp("small") / "model")


@pytest.mark.parametrize(("family", "dtype", "check"), CASES)
def test_a_cache_in_a_devices_memory_conforms(family, dtype, check, tmp_path):
    (subject,) = subjects(ON_DEVICE, tmp_path, families=(family,), dtype=dtype)
    try:
        CHECKS[check](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("device", "yielding"), [("cuda:0", [DType.BF16, DType.INT4]), ("cpu", [])])
def test_an_accelerator_is_left_to_other_backends_as_long_as_neither_was_measured(device, yielding, spec, monkeypatch):
    monkeypatch.setattr(registration, "_offered", lambda: {device: (DType.BF16, DType.INT4), "cpu": (DType.F32,)})
    capabilities = REGISTRATION.capabilities(spec)
    assert list(capabilities.yields) == yielding
    assert capabilities.prefix_cache == (device == "cpu")  # a block that is as long as the context is never full


@pytest.mark.parametrize("dtype", [DType.F32, DType.INT8, DType.INT4])
def test_it_computes_what_the_cpu_does(dtype, spec):
    found, right = decode(spec, DEVICE, dtype), decode(spec, HOST, dtype)
    assert np.sqrt(np.mean((found - right) ** 2) / np.mean(right**2)) < (1e-5 if dtype is DType.F32 else 2e-2)


@pytest.mark.parametrize(("dtype", "held"), [(DType.F32, "float32"), (DType.INT8, "float16")])
def test_a_block_is_a_lane_of_the_type_that_is_computed_with(dtype, held, tmp_path):
    spec = write_checkpoint(tmp_path / "model", CONFIGS["qwen3"])
    lane = 2 * 2 * 4 * 32 * 100 * np.dtype(held).itemsize
    model = create(spec, DeviceConfig(dtype=dtype, kv_cache_bytes=3 * lane + 1, max_context=100))
    assert (model.kv.block_size, model.kv.blocks, model.kv.bytes_per_block) == (100, 3, lane)
    assert model.kv.canonical_dtype == held
    model.close()


@pytest.mark.parametrize("together", [(0, 2), (0, 3, 4)], ids=["two change places", "one goes to an empty lane"])
def test_lanes_that_are_not_side_by_side_are_moved_within_the_device(spec, together):
    """What sequences hold behind that is, bit by bit, what they held before."""
    model = create(spec, DeviceConfig(dtype=DType.F32, kv_cache_bytes=1 << 20, max_context=64, threads=1))
    driver, ids = Driver(model), list(range(12))
    sequences = [driver.sequence() for _ in range(5)]
    for i, sequence in enumerate(sequences):
        driver.step(Piece(sequence, ids[i:], NONE))
    before = [model.export_kv(s.blocks, range(s.length)).data for s in sequences]
    driver.step(*(Piece(sequences[i], [1], NONE) for i in together))
    for i, sequence in enumerate(sequences):
        np.testing.assert_array_equal(model.export_kv(sequence.blocks, range(12 - i)).data, before[i])
    model.close()


def test_memory_of_a_device_that_nobody_measured_has_to_be_given(spec):
    with pytest.raises(StartError, match="kv_cache_gib: has to be given"):
        create(spec, DeviceConfig(dtype=DType.F32))


def test_more_than_a_device_has_is_refused(spec):
    with pytest.raises(StartError, match=r"cpu has no .* MiB for the KV cache; lower kv_cache_gib"):
        create(spec, DeviceConfig(dtype=DType.F32, kv_cache_bytes=1 << 50))


# Of a provider each: how it answers, and what is said of it.
def raises(*_):
    raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED :\n no kernel")


GOOD = np.ones((3, 5), np.float32)
FAKES = {
    "raises:0": (raises, "[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no kernel"),
    "wrong:0": (lambda *_: -GOOD, "its logits are off by 2 of their size"),
    "nothing:0": (lambda *_: GOOD * np.nan, "its logits are off by nan of their size"),
    "short:0": (lambda *_: GOOD[:2], "gives logits of shape (2, 5), not (3, 5)"),
    "works:0": (lambda *_: GOOD * 1.01, None),
}


def test_a_device_is_used_for_the_types_that_it_computes_rightly():
    def attempt(target, dtype):
        return GOOD if target is HOST else FAKES[target.device][0](target, dtype)

    told = list(prove([Target(device, "Some", "gpu") for device in FAKES], attempt))
    found = read([json.dumps(line).encode() for line in told], "")
    assert {device: set(proof.faults.values()) for device, proof in found.items()} == {d: {say} for d, (_, say) in FAKES.items()}
    assert found["works:0"].dtypes == (DType.BF16, DType.F32, DType.INT8, DType.INT4)
    assert found["raises:0"].dtypes == ()


def test_a_device_whose_memory_has_no_addresses_is_not_tried():
    (*_, last) = prove([Target("directml:0", PROVIDERS["directml"], None)], raises)
    assert last["fault"].startswith("the memory of DmlExecutionProvider has no addresses")


@pytest.mark.skipif("AzureExecutionProvider" not in NAMED, reason="this build of the runtime has none that computes no node")
def test_a_provider_that_leaves_nodes_to_the_cpu_is_refused(spec):
    told = list(prove([Target("azure:0", "AzureExecutionProvider", "cpu")], partial(decode, spec)))
    faults = {line["dtype"]: line["fault"] for line in told if "fault" in line}
    assert set(faults) == {"bf16", "f32", "int8", "int4"}
    assert all("fallback to CPU EP has been explicitly disabled" in fault for fault in faults.values())


def test_a_process_that_dies_says_so_of_what_it_was_trying():
    lines = [b'{"device": "cuda:0", "dtype": "bf16"}', b'{"device": "cuda:0", "dtype": "bf16", "fault": null}']
    lines += [b'{"device": "rocm:0", "dtype": "f32"}', b'{"device": "rocm:0", "dty']
    found = read(lines, "ended with -11", "no libcudnn")
    assert found["cuda:0"].dtypes == (DType.BF16,)
    assert found["rocm:0"].fault == "f32: ended with -11; it printed: no libcudnn"
    assert read([], "ended with -11")["accelerators"].fault == "f32, bf16, int8, int4: ended with -11"


def test_the_process_that_tries_them_answers():
    named = [kind for kind, provider in PROVIDERS.items() if provider in NAMED and kind != "cpu"]
    assert list(accelerators.proofs.__wrapped__()) == [f"{kind}:0" for kind in named]


@pytest.mark.skipif(not set(NAMED) & set(PROVIDERS.values()) - {HOST.provider}, reason="this runtime names no accelerator")
def test_an_accelerator_that_is_named_computes():
    assert {device: proof.fault for device, proof in accelerators.proofs().items() if not proof.dtypes} == {}


def test_proven_devices_come_first_and_others_are_told_with_their_reason(spec, monkeypatch):
    cuda = Proof({DType.BF16: None, DType.F32: "no kernel", DType.INT4: None})
    rocm = Proof(dict.fromkeys(DType, "no library"))
    monkeypatch.setattr(registration, "_installed", lambda: {"onnxruntime-gpu": "1.31"})
    monkeypatch.setattr(registration, "proofs", lambda: {"cuda:0": cuda, "rocm:0": rocm})
    unused = {"rocm:0": "f32, bf16, int8, int4: no library"}
    assert REGISTRATION.probe() == Available(("cuda:0", "cpu"), "1.31", unused)
    assert REGISTRATION.capabilities(spec).dtypes == (DType.BF16, DType.INT4)
    with pytest.raises(StartError, match="on cuda:0, cpu alone, not on rocm:0"):
        REGISTRATION.create(spec, DeviceConfig(device="rocm:0"))
    with pytest.raises(StartError, match="has no f32, but bf16, int4"):
        REGISTRATION.create(spec, DeviceConfig(dtype=DType.F32))


def test_the_build_for_cpus_runs_nothing_to_be_probed(monkeypatch):
    monkeypatch.setattr(registration, "_installed", lambda: {"onnxruntime": "1.31"})
    monkeypatch.setattr(subprocess, "run", raises)
    assert REGISTRATION.probe() == Available(("cpu",), "1.31")
