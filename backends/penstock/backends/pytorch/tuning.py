"""How a model is computed on a device, measured where the device has several ways of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import DType
from penstock.backends.pytorch.attention.measured import quickest
from penstock.backends.pytorch.attention.plan import Attention
from penstock.backends.pytorch.attention.selection import ON_PROCESSOR
from penstock.backends.pytorch.device import current
from penstock.backends.pytorch.device_int4 import DeviceInt4Product
from penstock.backends.pytorch.device_int8 import DeviceInt8Product
from penstock.backends.pytorch.kernel_rows import MakeShortProduct, kernel_rows
from penstock.backends.pytorch.precision import Precision, precision_of
from penstock.backends.pytorch.timing import recorded
from penstock.common.service import StartError

__all__ = ["Tuning", "tuning_of"]

_SHORT_PRODUCTS: Mapping[DType, MakeShortProduct] = {DType.INT8: DeviceInt8Product, DType.INT4: DeviceInt4Product}
_PRODUCTS_OF: Mapping[DType, tuple[DType, ...]] = {DType.INT8: (DType.INT8,), DType.INT4: (DType.INT4, DType.INT8)}


@dataclass(frozen=True, slots=True)
class Tuning:
    """The types and products of a model, how it attends, and the names of what was chosen, as `Tuned` has them."""

    precision: Precision
    attention: Attention
    ways: Mapping[str, str]


def tuning_of(spec: DecoderSpec, dtype: DType, device: torch.device, block_size: int, attention: Attention | None = None) -> Tuning:
    """How to compute a model; on an accelerator by what is quickest there. Nothing is kept on the device.

    Args:
        spec: the model's shape.
        dtype: of its weights.
        device: where it is to run.
        block_size: tokens of a block of its cache.
        attention: how it is to attend; None: it is chosen.

    Raises:
        StartError: the device computes no attention.
    """
    if device.type == "cpu":
        attention = attention or ON_PROCESSOR
        return Tuning(precision_of(dtype, device), attention, _named(attention))
    with torch.inference_mode(), current(device):
        rows = {
            short: kernel_rows(short, _SHORT_PRODUCTS[short], 2 * spec.intermediate_size, spec.hidden_size, device, recorded)
            for short in _PRODUCTS_OF.get(dtype, ())
        }
        precision = precision_of(dtype, device, rows)
        try:
            attention = attention or quickest(spec, precision.activations, block_size, device)
        except RuntimeError as error:
            raise StartError(str(error)) from error
        torch.cuda.empty_cache()  # what is free is asked for soon
    return Tuning(precision, attention, _named(attention) | {f"{short}_kernel_rows": str(count) for short, count in rows.items()})


def _named(attention: Attention) -> dict[str, str]:
    return dict(zip(("decode_attention", "prefill_attention"), attention.names, strict=True))
