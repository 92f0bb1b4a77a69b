"""Products of the torch backend on the CPU against float64: every type of weight, at every way of computing."""

import pytest
import torch

from penstock.backends.contract import DType
from penstock.backends.pytorch.packed import PackedProduct
from penstock.backends.pytorch.precision import multiplies_bfloat16, precision_of
from penstock.backends.pytorch.products import HostProduct, Int4Product, Int8Product

ROWS = [0, 1, 2, 3, 5, 40, 130]  # below, between and above the counts at which the way changes


def error(found, right):
    return ((found - right).square().mean() / right.square().mean()).sqrt().item()


@pytest.fixture
def weight():
    return torch.randn(640 + 96, 128, generator=torch.Generator().manual_seed(1))  # more than a tile, and part of another


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_products_are_those_of_the_weights(dtype, rows, weight):
    held, bias, x = weight.to(dtype), torch.randn(len(weight)), torch.randn(rows, 128)
    found = HostProduct(held, bias)(x)
    assert found.shape == (rows, len(weight))
    if rows:
        limit = 5e-3 if dtype == torch.bfloat16 and rows <= 2 else 1e-6  # one row is rounded, so that the short product takes it
        assert error(found.double(), x.double() @ held.double().T + bias) < limit


@pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor does not multiply bfloat16")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_packed_products_are_those_of_bfloat16(biased, rows, weight):
    held, bias, x = weight.bfloat16(), torch.randn(len(weight)).bfloat16(), torch.randn(rows, 128).bfloat16()
    found = PackedProduct(held, bias if biased else None)(x)
    assert (found.shape, found.dtype) == ((rows, len(weight)), torch.bfloat16)
    if rows:
        assert error(found.double(), x.double() @ held.double().T + (bias.double() if biased else 0)) < 5e-3


@pytest.mark.parametrize("rows", ROWS[1:])
@pytest.mark.parametrize(("make", "limit"), [(Int8Product, 0.012), (Int4Product, 0.12)])
@torch.inference_mode()
def test_quantised_products_are_near(make, limit, rows, weight):
    x = torch.randn(rows, 128)
    assert error(make(weight.bfloat16(), None)(x).double(), x.double() @ weight.double().T) < limit


@pytest.mark.parametrize("make", [Int8Product, Int4Product])
@torch.inference_mode()
def test_weights_of_nothing_but_zeros_give_zeros(make):
    assert not make(torch.zeros(64, 64, dtype=torch.bfloat16), None)(torch.randn(3, 64)).any()


@torch.inference_mode()
def test_four_bits_stand_for_sixteen_values(weight):
    product = Int4Product(weight.bfloat16(), None)
    rows = product(torch.eye(128))
    assert max(len(column.unique()) for column in rows.T) <= 16
    assert sum(buffer.nbytes for buffer in product.buffers()) < weight.numel() * 0.55


def test_activations_are_float32_where_the_processor_multiplies_no_bfloat16(monkeypatch):
    monkeypatch.setattr("penstock.backends.pytorch.precision.multiplies_bfloat16", lambda: False)
    assert precision_of(DType.BF16, torch.device("cpu")).activations == torch.float32
    monkeypatch.setattr("penstock.backends.pytorch.precision.multiplies_bfloat16", lambda: True)
    packed = precision_of(DType.BF16, torch.device("cpu"))
    assert (packed.activations, packed.product, packed.head) == (torch.bfloat16, PackedProduct, PackedProduct)
    assert precision_of(DType.INT8, torch.device("cpu")).activations == torch.float32
    assert precision_of(DType.F32, torch.device("cuda")).held == torch.float32
