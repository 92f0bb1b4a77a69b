"""What the conformance suite can not see of the torch backend: memory, threads, devices."""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.backends.checkpoint import read_model
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.driver import Driver, Piece
from penstock.backends.contract import Available, DeviceConfig, DType
from penstock.backends.pytorch import REGISTRATION
from penstock.backends.pytorch.registration import _accelerators
from penstock.common.service import StartError
from penstock.executor.config import ExecutorConfig
from penstock.executor.loading import create as load_prepared
from penstock.executor.loading import prepare


@pytest.fixture
def spec(checkpoint):
    return read_model(checkpoint, "m")


def create(spec, **settings):
    return REGISTRATION.create(spec, DeviceConfig(**{"kv_cache_bytes": 1 << 20, "device": "cpu", "dtype": DType.F32} | settings))


def mappings(spec):
    return Path("/proc/self/maps").read_text().count(str(spec.shards[0]))


def test_weights_of_its_own_type_are_the_files_pages(spec):
    model = create(spec)
    assert mappings(spec) == 1
    model.close()
    gc.collect()
    assert mappings(spec) == 0


def test_bfloat16_weights_are_the_files_pages_too(spec):
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in load_file(spec.shards[0]).items()}, spec.shards[0])
    spec = read_model(spec.folder, "m")
    converted = create(spec)
    assert mappings(spec) == 0
    kept = create(spec, dtype=DType.BF16)
    assert mappings(spec) == 1
    ids = list(range(40))
    one, two = (Driver(model).prefill(ids)[1] for model in (kept, converted))
    assert np.corrcoef(one.ravel(), two.ravel())[0, 1] > 0.999
    kept.close()
    converted.close()


def test_the_processs_threads_are_left_as_they_were(spec):
    before = torch.get_num_threads()
    model = create(spec, threads=before + 1)
    assert torch.get_num_threads() == before
    driver = Driver(model)
    driver.step(Piece(driver.sequence(), [1, 2, 3]))
    assert torch.get_num_threads() == before
    model.close()


def test_gradients_are_still_there_for_others(spec):
    model = create(spec)
    driver = Driver(model)
    driver.step(Piece(driver.sequence(), [1]))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    model.close()


@pytest.mark.parametrize("device", ["tpu9", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(spec, device):
    with pytest.raises(StartError, match=device):
        create(spec, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device can be used here")
def test_a_device_that_the_probe_promised_and_torch_can_not_use_ends_the_start(spec, monkeypatch):
    monkeypatch.setattr("penstock.backends.pytorch.registration._accelerators", lambda _: ("cuda:0",))
    prepared = prepare(ExecutorConfig(model=str(spec.folder), backend="torch", threads=1, kv_cache_gib=0.01))
    with pytest.raises(StartError, match=r"PyTorch can not use cuda:0: .*; CUDA_VISIBLE_DEVICES=-1 has it run on the CPU"):
        load_prepared(prepared)


def test_a_type_that_it_has_not_is_named(tmp_path):
    odd = CONFIGS["llama"] | {"intermediate_size": 88}  # no whole groups of 32
    spec = read_model(write_checkpoint(tmp_path, odd).folder, "m")
    assert DType.INT4 not in REGISTRATION.capabilities(spec).dtypes
    with pytest.raises(StartError, match="int4"):
        create(spec, dtype=DType.INT4)


def test_it_says_where_it_runs():
    answer = REGISTRATION.probe()
    assert isinstance(answer, Available)
    assert answer.devices[-1] == "cpu"
    assert answer.version == torch.__version__
    assert (answer.devices[0] == "cpu") == (not torch.cuda.is_available())


def test_a_build_without_an_accelerator_uses_none(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _accelerators("cuda: Optional[str] = None\nhip: Optional[str] = None\n") == ()


def test_hidden_devices_are_not_used(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert _accelerators("cuda: Optional[str] = '13.0'\n") == ()
