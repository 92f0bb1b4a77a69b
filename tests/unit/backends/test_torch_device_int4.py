"""Weights of four bits as an accelerator multiplies them, with PyTorch's packing of them imitated on the processor."""

from dataclasses import replace

import pytest
import structlog
import torch
from imitated_cuda import imitate_int4

from penstock.backends.checkpoint import read_model
from penstock.backends.conformance import CHECKS, subjects
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.contract import DType
from penstock.backends.pytorch import REGISTRATION, device_int4, tuning
from penstock.backends.pytorch.device_int4 import DeviceInt4Product, packing
from penstock.backends.pytorch.kernel_rows import kernel_rows
from penstock.backends.pytorch.model import TorchModel
from penstock.backends.pytorch.precision import precision_of
from penstock.backends.pytorch.products import four_bits
from penstock.backends.pytorch.registration import _capabilities

CPU = torch.device("cpu")


@pytest.fixture(params=[8, 16], ids=["nvidia", "amd"])
def device(request, monkeypatch):
    packing.cache_clear()
    imitate_int4(monkeypatch, request.param)
    yield request.param
    packing.cache_clear()


@pytest.mark.parametrize("inner_tiles", [2, 4, 8])
def test_the_order_of_packed_weights_is_found(device, inner_tiles):
    found = packing(CPU, inner_tiles)
    assert found.outputs == device
    codes = torch.randint(0, 16, (96, 3 * 16 * inner_tiles), dtype=torch.uint8)
    packed = found.pack(codes[:, ::2] << 4 | codes[:, 1::2])
    assert torch.equal(found.unpack(packed, codes.shape[1]), codes)
    assert torch.equal(found.unpack(packed[4:8], codes.shape[1]), codes[32:64])


def test_an_order_that_is_not_made_of_tiles_is_refused(monkeypatch):
    packing.cache_clear()
    monkeypatch.setattr(torch, "_convert_weight_to_int4pack", lambda pairs, _: pairs.flatten()[torch.randperm(pairs.numel())])
    with pytest.raises(RuntimeError, match="not known"):
        packing(CPU, 2)


@pytest.mark.parametrize("inputs", [32, 64, 96, 384])  # groups of 32, 64 and 128; 2, 4 and 8 tiles behind one another
@pytest.mark.parametrize("kernel_rows", [0, 2])
@pytest.mark.usefixtures("device")
@torch.inference_mode()
def test_products_are_near_by_the_kernel_and_widened(kernel_rows, inputs, monkeypatch):
    monkeypatch.setattr(device_int4, "_TILE", 64)  # more than one, and part of another
    weight, bias = torch.randn(160, inputs), torch.randn(160)
    product = DeviceInt4Product(weight.bfloat16(), bias.bfloat16(), kernel_rows)
    assert sum(buffer.nbytes for buffer in (product.weight, product.scales)) <= weight.numel() * (0.5 + 4 / 32)
    codes, scales, group = four_bits(weight.bfloat16())
    scale, middle = scales.double().repeat_interleave(group, 0).unbind(2)
    rounded = (codes.t().double() - 8) * scale + middle
    for rows in (0, 1, 2, 3, 40):
        x = torch.randn(rows, 2 * inputs).bfloat16()[:, :inputs]
        found = product(x)
        assert (found.dtype, found.shape) == (torch.bfloat16, (rows, len(weight)))
        if rows:
            right = x.double() @ rounded + bias.bfloat16()
            assert ((found.double() - right).square().mean() / right.square().mean()).sqrt() < 0.01


@pytest.mark.parametrize(
    "check", ["prompt_agrees_with_the_formulas", "decoding_agrees_with_the_formulas", "mixed_batch_agrees_with_each_alone"]
)
@pytest.mark.usefixtures("device")
def test_a_model_conforms(check, tmp_path, monkeypatch):
    rows = {DType.INT4: 2, DType.INT8: 1}
    monkeypatch.setattr(tuning, "precision_of", lambda dtype, device: precision_of(dtype, torch.device("cuda"), rows))
    create = lambda spec, config: TorchModel(spec, replace(config, device="cpu"))  # noqa: E731
    (subject,) = subjects(replace(REGISTRATION, create=create), tmp_path, families=("qwen3",), dtype=DType.INT4)
    CHECKS[check](subject)


@pytest.mark.usefixtures("device")
@torch.inference_mode()
def test_the_kernel_is_taken_as_far_as_it_is_quicker():
    clock = lambda compute: (compute(), 1.0 if (compute.func.__name__ == "by_kernel") == (len(compute.args[0]) <= 4) else 2.0)  # noqa: E731
    assert kernel_rows("int4", DeviceInt4Product, 96, 64, CPU, clock) == 4


@pytest.mark.parametrize("broken", ["_convert_weight_to_int4pack", "_weight_int4pack_mm"])
@pytest.mark.usefixtures("device")
@torch.inference_mode()
def test_a_device_without_the_kernel_widens_and_the_log_says_why(broken, monkeypatch):
    def absent(*_):
        raise RuntimeError("only supported on newer devices")

    monkeypatch.setattr(torch, broken, absent)
    with structlog.testing.capture_logs() as logs:
        rows = kernel_rows("int4", DeviceInt4Product, 96, 64, CPU, lambda compute: (compute(), 1.0))
    assert rows == 0
    assert "only supported on newer devices" in logs[0]["tried"][0]
    assert DeviceInt4Product(torch.randn(96, 64).bfloat16(), None, rows)(torch.randn(3, 64).bfloat16()).isfinite().all()


def test_it_is_offered_where_an_accelerator_is(tmp_path, monkeypatch):
    spec = read_model(write_checkpoint(tmp_path, CONFIGS["llama"]).folder, "m")
    monkeypatch.setattr("penstock.backends.pytorch.registration._accelerators", lambda _: ("cuda:0",))
    assert _capabilities(spec).dtypes == (DType.BF16, DType.F32, DType.INT8, DType.INT4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="multiplies on a CUDA or ROCm device")
@pytest.mark.parametrize("check", ["prompt_agrees_with_the_formulas", "decoding_agrees_with_the_formulas"])
def test_a_model_conforms_on_a_device(check, tmp_path):
    (subject,) = subjects(REGISTRATION, tmp_path, families=("qwen3",), dtype=DType.INT4)
    CHECKS[check](subject)
