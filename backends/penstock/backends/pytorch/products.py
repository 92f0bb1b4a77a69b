"""Products on the CPU: float32 activations with weights that are held in float32 or in something shorter.

A processor without bfloat16 arithmetic multiplies matrices of it in a scalar loop. Here a shorter weight is widened tile by tile
into a buffer that stays in the cache, and multiplied there in float32: main memory is read once, in the short type. What one with
such arithmetic does with bfloat16 weights is in `packed.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["INT4_GROUPS", "HostProduct", "Int4Product", "Int8Product", "four_bits"]

# Below these row counts a vector's product with the short weight itself is quicker than widening it.
_BFLOAT16_ROWS = 2
_INT8_ROWS = 4
# From so many rows on, the arithmetic outweighs all else, and the library's own order of operands is the quicker one.
_MANY_ROWS = 128
_NARROW_TILE, _WIDE_TILE = 512, 8192  # outputs that are widened at a time

INT4_GROUPS = (128, 64, 32)
"""Inputs that may share a scale and an offset in four bits, as PyTorch's kernels know them; best first."""


class HostProduct(nn.Module):
    """A linear map of float32 activations, [T, inputs] to [T, outputs]; its weight is float32 or bfloat16."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product, with the bias where there is one."""
        out = self.product(x)
        return out if self.bias is None else out + self.bias

    def product(self, x: Tensor) -> Tensor:
        """The product alone, by whichever way is quickest for so many rows."""
        if len(x) <= _BFLOAT16_ROWS and self.weight.dtype == torch.bfloat16:
            return functional.linear(x.bfloat16(), self.weight).float()
        return _widened(x, self.weight)


class Int8Product(HostProduct):
    """The same with weights of eight bits, symmetric, a scale for each output.

    Few rows go through PyTorch's kernel for it, which takes bfloat16 activations; more are widened, and lose nothing more.
    """

    scales: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        wide = weight.float()
        # Rounded before they are used, so that the kernel's bfloat16 scales are the very ones.
        scales = _positive(wide.abs().amax(1) / 127).bfloat16()
        super().__init__((wide / scales[:, None]).round_().clamp_(-127, 127).to(torch.int8), bias)
        self.register_buffer("scales", scales)

    def product(self, x: Tensor) -> Tensor:
        """The product alone."""
        if len(x) <= _INT8_ROWS:
            return torch._weight_int8pack_mm(x.bfloat16(), self.weight, self.scales).float()  # noqa: SLF001  it has no other name
        return _widened(x, self.weight).mul_(self.scales)


class Int4Product(nn.Module):
    """A linear map whose weights have four bits, with a scale and an offset for each group of inputs, by PyTorch's own kernel."""

    packed: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        codes, scales, self._group = four_bits(weight)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))  # noqa: SLF001  the same
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """Float32 [T, outputs] from float32 [T, inputs]."""
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu  # noqa: SLF001  the same
        out: Tensor = kernel(x.bfloat16(), self.packed, self._group, self.scales).float()
        return out if self.bias is None else out + self.bias


def four_bits(weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """A weight [outputs, inputs] in four bits.

    Returns:
        Codes, int32 [outputs, inputs] of 0 to 15; for each group of inputs and each output the scale, and what the code 8 stands
        for: bfloat16 [groups, outputs, 2], as PyTorch's kernels take them; and the inputs of a group.
    """
    outputs, inputs = weight.shape
    group = next(group for group in INT4_GROUPS if inputs % group == 0)
    grouped = weight.float().unflatten(1, (-1, group))  # type: ignore[no-untyped-call]  # torch gives it no types
    least, most = grouped.aminmax(dim=2, keepdim=True)
    scales = _positive((most - least) / 15).bfloat16().float()
    middle = (least + 8 * scales).bfloat16().float()
    codes = ((grouped - middle) / scales + 8).round_().clamp_(0, 15).to(torch.int32).view(outputs, inputs)
    return codes, torch.cat((scales, middle), dim=2).transpose(0, 1).bfloat16().contiguous(), group


def _positive(scales: Tensor) -> Tensor:
    """One instead of those that leave no precision: such weights become zeros."""
    return torch.where(scales < torch.finfo(torch.bfloat16).tiny, 1.0, scales)


def _widened(x: Tensor, weight: Tensor) -> Tensor:
    """Float32 [T, outputs] of float32 `x` [T, inputs] and `weight` [outputs, inputs] of any type."""
    outputs, inputs = weight.shape
    if len(x) == 1 or len(x) >= _MANY_ROWS:
        parts = [functional.linear(x, part.float()) for part in torch.split(weight, _WIDE_TILE)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    columns = x.t()
    # The weight stands on the left: of a few columns, the library's product is up to twice as quick as of a few rows.
    if weight.dtype == x.dtype:
        return torch.mm(weight, columns).t().contiguous()
    out, tile = x.new_empty(outputs, len(x)), x.new_empty(min(_NARROW_TILE, outputs), inputs)
    for first in range(0, outputs, _NARROW_TILE):
        part = weight[first : first + _NARROW_TILE]
        torch.mm(tile[: len(part)].copy_(part), columns, out=out[first : first + _NARROW_TILE])
    return out.t().contiguous()
