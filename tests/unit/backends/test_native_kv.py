"""Native forms of KV beyond one backend: shared ones, those of a device, and those of a process of its own."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import numpy_backend
import pytest
import torch

from penstock.backends.apart.model import ModelApart
from penstock.backends.conformance import CHECKS, PAIR_CHECKS, Pair, subjects
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.contract import DeviceConfig, KvChunk, KvSpec
from penstock.backends.fake import REGISTRATION as FAKE
from penstock.backends.fake import FakeModel
from penstock.backends.openvino import REGISTRATION as OPENVINO
from penstock.backends.pytorch import REGISTRATION as TORCH
from penstock.backends.pytorch.cache import CacheCopies, HostCopies, described
from penstock.backends.validation import fault_of_model

LAYERS, HEADS, DIM, BLOCK, BLOCKS, TOKENS = 3, 2, 8, 16, 6, 45
PLACES = [4, 0, 3]


def test_torch_shares_its_form_with_what_lies_alike_and_not_with_openvino(tmp_path):
    alike, torchs, openvinos = (
        next(iter(subjects(registration, tmp_path, families=("qwen3",))))
        for registration in (numpy_backend.registration(), TORCH, OPENVINO)
    )
    for pair in (Pair(alike, torchs), Pair(torchs, alike)):
        PAIR_CHECKS["blocks_serve_the_other"](pair)
    with torchs.model() as one, openvinos.model() as other:
        assert one.kv.native_layout != other.kv.native_layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_copies_as_the_host_does(dtype):
    kv = KvSpec(BLOCK, BLOCKS, LAYERS * 2 * BLOCK * HEADS * DIM * dtype.itemsize, "any", "any", (LAYERS, HEADS, DIM))
    kv = described(kv, dtype)
    filled = torch.randn(LAYERS, 2, BLOCKS + 1, BLOCK, HEADS, DIM).to(dtype)
    device, host = (copies(filled.clone(), kv) for copies in (CacheCopies, HostCopies))
    sent = device.read(PLACES, range(5, TOKENS))
    assert sent.data.dtype.name == kv.canonical_dtype
    np.testing.assert_array_equal(sent.data, host.read(PLACES, range(5, TOKENS)).data)
    blocks = device.read_blocks(PLACES)
    np.testing.assert_array_equal(blocks, host.read_blocks(PLACES))
    np.testing.assert_array_equal(blocks[1], filled[:, :, PLACES[1]].contiguous().view(torch.uint8).flatten().numpy())
    for copies in (device, host):
        copies.write([2, 5, 1], KvChunk(range(7, 40), sent.data[:, :, :33].astype(np.float16)))
        copies.write_blocks([0, 1], blocks[1:])
    everything = list(range(BLOCKS))
    np.testing.assert_array_equal(device.read_blocks(everything), host.read_blocks(everything))
    np.testing.assert_array_equal(host.read_blocks([0, 1]), blocks[1:])


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"), CONFIGS["qwen3"])


@pytest.mark.parametrize("check", ["native_blocks_are_used", "wrong_native_blocks_are_refused", "kv_travels_in_every_type"])
def test_both_forms_go_through_a_process_of_its_own(check, tmp_path):
    apart = replace(FAKE, create=lambda spec, config: ModelApart("fake", spec, config))
    (subject,) = subjects(apart, tmp_path, families=("qwen3",))
    with subject.model() as model:
        assert model.kv == FakeModel(subject.spec, subject.config()).kv
    CHECKS[check](subject)


def test_what_a_cache_says_of_itself_is_checked(spec):
    model = FakeModel(spec, DeviceConfig())
    capabilities = FAKE.capabilities(spec)
    assert fault_of_model(model, capabilities) is None
    for wrong, field in (
        ({"native_layout": 7}, "native_layout"),
        ({"canonical_dtype": "int8"}, "canonical_dtype"),
        ({"copies_prefixes": 1}, "copies_prefixes: must be True or False"),
        ({"copies_prefixes": True}, "copy_prefix is not there"),
    ):
        model.kv = replace(model.kv, **wrong)
        assert field in fault_of_model(model, capabilities)
        model.kv = FakeModel(spec, DeviceConfig()).kv
    model.ways = {"matmul": 3}
    assert "ways: must be names" in fault_of_model(model, capabilities)
    del model.ways
    without = SimpleNamespace(kv=model.kv, dtype=model.dtype, device=model.device)
    assert "export_blocks" in fault_of_model(without, capabilities)
    model.kv = replace(model.kv, token_shape=(1, 0, 4))
    assert "token_shape" in fault_of_model(model, capabilities)
