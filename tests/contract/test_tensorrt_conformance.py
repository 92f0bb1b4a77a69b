"""The TensorRT backend, everything of it but TensorRT and the GPU, against the suite that every backend has to pass."""

import pytest
import tensorrt_stand_in
from tensorrt_stand_in import HostDevice

from penstock.backends.conformance import CHECKS, NotApplicable, subjects
from penstock.backends.conformance.checkpoints import CONFIGS
from penstock.backends.contract import Available, DType, Registration
from penstock.backends.tensorrt import REGISTRATION
from penstock.backends.tensorrt.model import TensorRtModel


@pytest.fixture(scope="session")
def subject_of(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("tensorrt"), {}

    def create(spec, config):
        return TensorRtModel(spec, config, tensorrt_stand_in, HostDevice(), folder / "plans")

    registration = Registration(
        "tensorrt", lambda: Available(("cpu",), tensorrt_stand_in.__version__), REGISTRATION.capabilities, create
    )

    def get(family, dtype):
        if (family, dtype) not in made:
            made[family, dtype] = next(subjects(registration, folder / family, families=(family,), dtype=dtype))
        return made[family, dtype]

    return get


def conform(subject, check):
    try:
        CHECKS[check](subject)
    except NotApplicable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("family", CONFIGS)
def test_it_conforms(family, check, subject_of):
    conform(subject_of(family, DType.F32), check)


@pytest.mark.parametrize("check", ["prompt_agrees_with_the_formulas", "mixed_batch_agrees_with_each_alone", "imported_kv_is_used"])
def test_it_conforms_in_bfloat16(check, subject_of):
    conform(subject_of("qwen3", DType.BF16), check)
