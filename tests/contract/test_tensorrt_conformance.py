"""The TensorRT backend, everything of it but TensorRT and the GPU, against the suite that every backend has to pass."""

import numpy as np
import pytest
import tensorrt_stand_in
import torch
from conforming import CASES
from tensorrt_stand_in import HostDevice

from penstock.backends.checkpoint import read_model
from penstock.backends.conformance import CHECKS, PAIR_CHECKS, NotApplicable, Pair, subjects
from penstock.backends.conformance.driver import Driver, Piece
from penstock.backends.contract import Available, DeviceConfig, DType, Registration
from penstock.backends.registry import backends
from penstock.backends.tensorrt import REGISTRATION, model
from penstock.backends.tensorrt.memory import kv_rows
from penstock.backends.tensorrt.model import TensorRtModel

VARIANTS = ("llama-tied", "llama-3-rope", "llama-linear-rope", "mistral-window", "qwen2", "qwen2-yarn", "qwen3")


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


@pytest.mark.parametrize(("family", "check"), CASES)
def test_it_conforms(family, check, subject_of):
    conform(subject_of(family, DType.F32), check)


@pytest.mark.parametrize(
    "check",
    ["prompt_agrees_with_the_formulas", "mixed_batch_agrees_with_each_alone", "imported_kv_is_used", "native_blocks_are_used"],
)
def test_it_conforms_in_bfloat16(check, subject_of):
    conform(subject_of("qwen3", DType.BF16), check)


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_torch_takes_its_blocks_as_they_lie(dtype, subject_of, tmp_path):
    (torchs,) = subjects(backends()["torch"], tmp_path, families=("qwen3",), dtype=dtype)
    PAIR_CHECKS["blocks_serve_the_other"](Pair(subject_of("qwen3", dtype), torchs))
    PAIR_CHECKS["blocks_serve_the_other"](Pair(torchs, subject_of("qwen3", dtype)))


def test_no_slot_that_was_never_written_holds_a_nan(subject_of, monkeypatch):
    monkeypatch.setattr(model, "kv_rows", lambda *sizes: kv_rows(*sizes).fill_(float("nan")))
    with subject_of("qwen3", DType.F32).model() as made:
        assert not made.export_blocks(range(made.kv.blocks)).any()


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_ids_are_those_of_transformers(name, checkpoints, tmp_path):
    checkpoint = checkpoints(name)
    spec = read_model(checkpoint.folder, name)
    prompts = [np.random.default_rng(length).integers(0, 512, length).tolist() for length in (1, 40, 90)]
    config = DeviceConfig(dtype=DType.F32, kv_cache_bytes=8 << 20, max_batch_size=4, max_batch_tokens=256)
    model = TensorRtModel(spec, config, tensorrt_stand_in, HostDevice(), tmp_path)
    driver = Driver(model)
    sequences = [driver.sequence() for _ in prompts]
    new, told = prompts, [[] for _ in prompts]
    for _ in range(16):
        found = driver.step(*(Piece(s, ids) for s, ids in zip(sequences, new, strict=True)))
        new = [[int(logits[0].argmax())] for logits in found]
        for ids, (token,) in zip(told, new, strict=True):
            ids.append(token)
    model.close()
    for prompt, ids in zip(prompts, told, strict=True):
        with torch.inference_mode():
            right = checkpoint.model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=16,
            )
        assert ids == right[0, len(prompt) :].tolist()
