"""What conformance can not see of the TensorRT backend: plans on disk, what the builder is told, and TensorRT's own names."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorrt_stand_in
from tensorrt_stand_in import Builder, BuilderFlag, Context, HostDevice

from penstock.backends import tensorrt
from penstock.backends.checkpoint import read_model
from penstock.backends.conformance.driver import Driver, Piece
from penstock.backends.contract import Broken, DeviceConfig, DType, Unavailable
from penstock.backends.tensorrt import REGISTRATION
from penstock.backends.tensorrt.memory import ALIGNMENT, aligned_rows
from penstock.backends.tensorrt.model import TensorRtModel
from penstock.common.service import StartError

TOOL = Path(__file__).parents[3] / "tools" / "check_tensorrt_api.py"


@pytest.fixture
def spec(checkpoint):
    return read_model(checkpoint, "m")


@pytest.fixture
def start(spec, tmp_path):
    """Starts a model and gives it with the engines that were built for it; its plans are in `tmp_path / plans`."""
    made = []

    def start(spec=spec, device=None, **settings):
        before = Builder.builds
        sizes = {"dtype": DType.F32, "kv_cache_bytes": 1 << 20, "max_batch_size": 4, "max_batch_tokens": 64}
        model = TensorRtModel(spec, DeviceConfig(**sizes | settings), tensorrt_stand_in, device or HostDevice(), tmp_path / "plans")
        made.append(model)
        return model, Builder.builds - before

    yield start
    for model in made:
        model.close()


def logits(model):
    return Driver(model).prefill(list(range(20)))[1]


def the_plan(tmp_path):
    (plan,) = (tmp_path / "plans").glob("*.plan")
    return plan


def test_a_plan_serves_the_next_start(start, tmp_path):
    first, built = start()
    again, rebuilt = start()
    assert (built, rebuilt) == (1, 0)
    np.testing.assert_array_equal(logits(first), logits(again))
    assert the_plan(tmp_path).parent.stat().st_mode & 0o077 == 0
    assert not list((tmp_path / "plans").glob(".*"))


def test_plans_are_kept_in_the_cache_folder_that_the_executor_gives(spec, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_stand_in)
    monkeypatch.setattr("penstock.backends.tensorrt.device.CudaDevice", lambda _: HostDevice())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "default"))
    settings = {"dtype": DType.F32, "kv_cache_bytes": 1 << 20, "max_batch_size": 4, "max_batch_tokens": 64}
    for given, expected in ((None, 0), (tmp_path / "given", 1)):
        REGISTRATION.create(spec, DeviceConfig(**settings, weight_cache=given)).close()
        assert len(list((tmp_path / "given" / "tensorrt").glob("*.plan"))) == expected
    assert not (tmp_path / "default").exists()


@pytest.mark.parametrize("spoil", [lambda b: b[:-9], lambda b: b[:-9] + b"x" + b[-8:], lambda b: b"", lambda b: b"{}\n"])
def test_a_spoilt_plan_is_built_anew(spoil, start, tmp_path):
    right = logits(start()[0])
    plan = the_plan(tmp_path)
    plan.write_bytes(spoil(plan.read_bytes()))
    model, built = start()
    assert built == 1
    np.testing.assert_array_equal(logits(model), right)
    assert start()[1] == 0


def test_a_plan_is_for_one_gpu_type_shape_and_model(start, spec):
    assert start()[1] == 1
    assert start(device=HostDevice("Another 10.0"))[1] == 1
    assert start(dtype=DType.BF16)[1] == 1
    assert start(max_batch_size=8)[1] == 1
    assert start(spec=replace(spec, fingerprint="another"))[1] == 1
    assert start()[1] == 0


def test_a_plan_of_another_version_is_built_anew(start, monkeypatch):
    start()
    monkeypatch.setattr(tensorrt_stand_in, "__version__", "11.5.0.1")
    assert start()[1] == 1


def test_timings_of_one_build_serve_the_next(start, tmp_path):
    start()
    start(max_batch_size=8)
    (timings,) = (tmp_path / "plans").glob("*.timings")
    assert timings.read_bytes().count(b" build ") == 2


def test_a_folder_that_takes_no_plan_costs_only_the_next_start(start, tmp_path):
    (tmp_path / "plans").write_text("a file")
    with pytest.warns(UserWarning, match="keeps no"):
        model, built = start()
    assert built == 1
    assert np.isfinite(logits(model)).all()


def test_float32_is_not_computed_with_ten_bits(start):
    start()
    assert BuilderFlag.TF32 not in Builder.flags


def test_what_tensorrt_says_of_a_failed_build_is_told(start, monkeypatch):
    monkeypatch.setattr(Builder, "fail", "no kernel for this")
    with pytest.raises(StartError, match="no kernel for this"):
        start()


def test_decodes_of_one_step_are_one_run(start):
    model, _ = start()
    driver = Driver(model)
    sequences = [driver.prefill(list(range(length)))[0] for length in (3, 20, 40)]
    before = Context.runs
    driver.step(*(Piece(sequence, [1]) for sequence in sequences))
    assert Context.runs == before + 1


def test_a_type_that_it_has_not_is_named(start):
    with pytest.raises(StartError, match="int8"):
        start(dtype=DType.INT8)


@pytest.mark.parametrize("row_bytes", [4, 48, 256, 768, 2048])
def test_layers_of_a_cache_begin_aligned(row_bytes):
    rows = aligned_rows(100, row_bytes)
    assert rows >= 100
    assert rows * row_bytes % ALIGNMENT == 0


def test_without_tensorrt_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(tensorrt, "find_spec", lambda name: None)
    assert REGISTRATION.probe() == Unavailable(
        "tensorrt is not installed; on a machine with an NVIDIA GPU, install penstock[tensorrt]"
    )


def test_libraries_that_do_not_load_are_broken_and_not_absent(monkeypatch):
    def fail(name):
        raise OSError("libcuda.so.1: no such file")

    monkeypatch.setattr(tensorrt, "version", lambda name: "11.4.0.106")
    monkeypatch.setattr(tensorrt.importlib, "import_module", fail)
    assert tensorrt.judge() == Broken("tensorrt can not be imported: OSError: libcuda.so.1: no such file")


def test_a_version_before_strong_types_is_refused(monkeypatch):
    monkeypatch.setattr(tensorrt, "version", lambda name: "10.14.1.48")
    monkeypatch.setattr(tensorrt.importlib, "import_module", lambda name: None)
    assert isinstance(tensorrt.judge(), Broken)


def test_its_names_are_tensorrts_own():
    done = subprocess.run([sys.executable, TOOL], capture_output=True, text=True, timeout=180, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
