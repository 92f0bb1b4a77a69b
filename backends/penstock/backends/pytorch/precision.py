"""In which type weights are held and activations computed, by what the device can multiply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from penstock.backends.contract import DType
from penstock.backends.pytorch.device_int4 import DeviceInt4Product
from penstock.backends.pytorch.device_int8 import DeviceInt8Product
from penstock.backends.pytorch.packed import PackedProduct
from penstock.backends.pytorch.products import HostProduct, Int4Product, Int8Product

__all__ = ["Precision", "precision_of"]

_BY_NO_KERNEL: Mapping[DType, int] = {}

MakeProduct = Callable[[Tensor, Tensor | None], nn.Module]


@dataclass(frozen=True, slots=True)
class Precision:
    """How a dtype is served on a device.

    Attributes:
        held: the type of weights as they are read, and of the KV cache.
        activations: the type of everything between products; biases and norms' weights have it too.
        product: makes a linear map of a weight [outputs, inputs], in the type `held`, and a bias.
        head: the same for the vocabulary's.
    """

    held: torch.dtype
    activations: torch.dtype
    product: MakeProduct
    head: MakeProduct


def precision_of(dtype: DType, device: torch.device, kernel_rows: Mapping[DType, int] = _BY_NO_KERNEL) -> Precision:
    """How `dtype` is served on `device`. Four-bit models keep their vocabulary's product in eight: that one shows in each logit.

    Args:
        dtype: of the weights.
        device: where they are.
        kernel_rows: on an accelerator, up to how many rows products with weights of each type go through a kernel.
    """
    held = torch.float32 if dtype == DType.F32 else torch.bfloat16
    if device.type == "cuda" and dtype.quantised:
        int8 = partial(DeviceInt8Product, rows=kernel_rows.get(DType.INT8, 0))
        int4 = partial(DeviceInt4Product, rows=kernel_rows.get(DType.INT4, 0))
        return Precision(held, held, int4 if dtype == DType.INT4 else int8, int8)
    if device.type == "cuda":
        return Precision(held, held, _linear, _linear)
    if dtype == DType.BF16 and multiplies_bfloat16():
        return Precision(held, held, PackedProduct, PackedProduct)
    products = {DType.INT8: Int8Product, DType.INT4: Int4Product}
    product: MakeProduct = products.get(dtype, HostProduct)
    return Precision(held, torch.float32, product, Int8Product if dtype.quantised else HostProduct)


def multiplies_bfloat16() -> bool:
    """Whether PyTorch hands products of bfloat16 on this processor to oneDNN; elsewhere they run in a scalar loop."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001  it has no other name


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
