"""Weights of eight bits as an accelerator multiplies them, run on the processor by the same calls."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import structlog
import torch
from imitated_cuda import imitate

from penstock.backends.conformance import CHECKS, subjects
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.contract import DType
from penstock.backends.pytorch import REGISTRATION, tuning
from penstock.backends.pytorch.attention.selection import ON_PROCESSOR
from penstock.backends.pytorch.device_int8 import DeviceInt8Product
from penstock.backends.pytorch.kernel_rows import kernel_rows
from penstock.backends.pytorch.model import TorchModel
from penstock.backends.pytorch.precision import precision_of

CPU = torch.device("cpu")


@pytest.fixture
def on_the_processor(monkeypatch):
    """Models hold and multiply int8 as on an accelerator, up to two rows by PyTorch's kernel."""
    monkeypatch.setattr(tuning, "precision_of", lambda dtype, device: precision_of(dtype, torch.device("cuda"), {DType.INT8: 2}))


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 40])
@torch.inference_mode()
def test_products_are_near_by_the_kernel_and_widened(rows):
    weight, bias, x = torch.randn(8192 + 96, 128), torch.randn(8192 + 96), torch.randn(rows, 128).bfloat16()
    product = DeviceInt8Product(weight.bfloat16(), bias.bfloat16(), rows=2)
    found = product(x)
    assert (found.dtype, found.shape) == (torch.bfloat16, (rows, len(weight)))
    assert product.weight.dtype == torch.int8
    if rows:
        right = x.double() @ weight.double().T + bias
        assert ((found.double() - right).square().mean() / right.square().mean()).sqrt() < 0.02
        torch.testing.assert_close(product.by_kernel(x), product.widened(x), atol=0.5, rtol=0.02)


@pytest.mark.parametrize(
    "check", ["prompt_agrees_with_the_formulas", "decoding_agrees_with_the_formulas", "mixed_batch_agrees_with_each_alone"]
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # with biases, and with norms of heads
@pytest.mark.usefixtures("on_the_processor")
def test_a_model_conforms(family, check, tmp_path):
    create = lambda spec, config: TorchModel(spec, replace(config, device="cpu"))  # noqa: E731
    (subject,) = subjects(replace(REGISTRATION, create=create), tmp_path, families=(family,), dtype=DType.INT8)
    CHECKS[check](subject)


def timed(quickest_up_to):
    """A clock by which the kernel is the quicker one for so many rows at most."""

    def clock(compute):
        (x,) = compute.args
        by_kernel = compute.func.__name__ == "by_kernel"
        return compute(), 1.0 if by_kernel == (len(x) <= quickest_up_to) else 2.0

    return clock


@pytest.mark.parametrize(("quickest_up_to", "rows"), [(0, 0), (1, 1), (7, 4), (1000, 64)])
@torch.inference_mode()
def test_the_kernel_is_taken_as_far_as_it_is_quicker(quickest_up_to, rows):
    assert kernel_rows("int8", DeviceInt8Product, 96, 64, CPU, timed(quickest_up_to)) == rows


def absent(product, x):
    raise RuntimeError("no kernel image is available\nfor this device")


@pytest.mark.parametrize(("kernel", "reason"), [(absent, "no kernel image"), (lambda product, x: -product.widened(x), "2 apart")])
@torch.inference_mode()
def test_a_kernel_that_raises_or_is_wrong_is_not_taken_and_the_log_says_why(kernel, reason, monkeypatch):
    monkeypatch.setattr(DeviceInt8Product, "by_kernel", kernel)
    with structlog.testing.capture_logs() as logs:
        assert (
            kernel_rows(
                "int8", DeviceInt8Product, 96, 64, CPU, lambda compute: (compute(), 0.0 if compute.func.__func__ is kernel else 1.0)
            )
            == 0
        )
    assert reason in logs[0]["tried"][0]


def test_a_device_is_tuned_before_anything_is_loaded(tmp_path, monkeypatch):
    imitate(monkeypatch)
    decoder = write_checkpoint(tmp_path, CONFIGS["llama"]).decoder
    kind = SimpleNamespace(type="cuda")  # where it is told to the processor
    monkeypatch.setattr(tuning, "kernel_rows", lambda *asked: kernel_rows(*asked[:4], CPU, asked[5]))
    found = tuning.tuning_of(decoder, DType.INT8, kind, 16, ON_PROCESSOR)
    assert int(found.ways["int8_kernel_rows"]) in {0, 1, 2, 4, 8, 16, 32, 64}
    assert found.ways["decode_attention"] == "gathered"
    product = found.precision.product(torch.randn(64, 32).bfloat16(), None)
    assert product.rows == int(found.ways["int8_kernel_rows"])
    assert "int8_kernel_rows" not in tuning.tuning_of(decoder, DType.BF16, kind, 16, ON_PROCESSOR).ways


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="multiplies on a CUDA or ROCm device")
@pytest.mark.parametrize("check", ["prompt_agrees_with_the_formulas", "decoding_agrees_with_the_formulas"])
def test_a_model_conforms_on_a_device(check, tmp_path):
    (subject,) = subjects(REGISTRATION, tmp_path, families=("qwen3",), dtype=DType.INT8)
    CHECKS[check](subject)
