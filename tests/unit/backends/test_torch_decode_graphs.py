"""Recorded decode steps: their shapes and padding on the CPU, where nothing is recorded, and the recording itself where a GPU is."""

import numpy as np
import pytest
import torch
from imitated_cuda import imitate

from penstock.backends.checkpoint import read_model
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.driver import Driver, Piece
from penstock.backends.contract import DeviceConfig, DType
from penstock.backends.pytorch import REGISTRATION
from penstock.backends.pytorch.decode_graphs import CudaCapture


@pytest.fixture(params=["llama", "mistral"])  # the latter with a window
def spec(request, tmp_path):
    return read_model(write_checkpoint(tmp_path, CONFIGS[request.param]).folder, "m")


def create(spec, device="cpu"):
    return REGISTRATION.create(spec, DeviceConfig(kv_cache_bytes=1 << 20, device=device, dtype=DType.F32))


def decoded(model):
    """Logits of steps with one to five sequences of very different lengths, and of a step with a prompt beside them."""
    driver, told = Driver(model), []
    sequences = [driver.sequence() for _ in range(5)]
    for i, sequence in enumerate(sequences):
        driver.step(Piece(sequence, list(range(1, 2 + 23 * i))))
    for count in (1, 2, 3, 5, 3):
        told += driver.step(*(Piece(sequence, [7 + count]) for sequence in sequences[:count]))
    told += driver.step(Piece(sequences[0], [3]), Piece(driver.sequence(), [4, 5, 6]))
    return np.concatenate([np.atleast_2d(logits) for logits in told])


def test_padded_steps_are_those_of_any_shape(spec):
    plain, padded = create(spec), create(spec)
    captured = []
    padded._graphs = padded._record_by(lambda compute: captured.append(compute) or compute)
    np.testing.assert_allclose(decoded(padded), decoded(plain), atol=1e-4, rtol=1e-3)
    assert len(padded._graphs) == len(captured)
    assert len(captured) == len(set(padded._graphs._recorded)) == 4  # the second step of three was known
    assert {bucket.sequences for bucket in padded._graphs._recorded} == {1, 2, 4, 8}


def test_padding_touches_no_block_but_its_own(spec):
    model = create(spec)
    model._graphs = model._record_by(lambda compute: compute)
    driver = Driver(model)
    sequences = [driver.sequence() for _ in range(3)]
    for sequence in sequences:
        driver.step(Piece(sequence, [1, 2, 3]))
    model._cache[:, :, : model.kv.blocks] = 5.0
    model._cache[:, :, model.kv.blocks] = 0.0
    driver.step(*(Piece(sequence, [4]) for sequence in sequences))  # padded to four
    changed = (model._cache != 5.0).flatten(4).any(-1).any(0).any(0)[: model.kv.blocks]
    assert changed.sum() == 3
    assert model._cache[:, :, model.kv.blocks].any()


def test_a_model_behind_a_closed_one_records_its_own(spec, monkeypatch):
    imitate(monkeypatch)
    for _ in range(2):
        model = create(spec)
        model._graphs = model._record_by(CudaCapture())
        driver = Driver(model)
        sequences = [driver.sequence() for _ in range(2)]
        driver.step(Piece(sequences[0], [1]))
        driver.step(*(Piece(sequence, [2]) for sequence in sequences))
        memory = {replay.__closure__[0].cell_contents.pool() for _, _, replay in model._graphs._recorded.values()}
        assert len(model._graphs) == 2
        assert len(memory) == 1  # shared by the model's graphs
        model.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs: needs a CUDA or ROCm device")
def test_recorded_steps_are_those_launched_one_by_one(spec):
    recorded, launched = create(spec, "cuda:0"), create(spec, "cuda:0")
    launched._graphs = None
    np.testing.assert_allclose(decoded(recorded), decoded(launched), atol=1e-3, rtol=1e-2)
    assert len(recorded._graphs) == 4
