"""Products on an accelerator with weights of eight bits and bfloat16 activations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from penstock.backends.pytorch.products import Int8Product

__all__ = ["DeviceInt8Product"]

_TILE = 8192  # outputs that are widened at a time


class DeviceInt8Product(Int8Product):
    """A linear map of bfloat16 activations, [T, inputs] to [T, outputs].

    Up to `rows` go through PyTorch's kernel for it, which reads the weight for each of them; more are multiplied with the weight
    widened.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int) -> None:
        super().__init__(weight, bias)
        self.rows = rows

    def product(self, x: Tensor) -> Tensor:
        """The product alone."""
        return self.by_kernel(x) if len(x) <= self.rows else self.widened(x)

    def by_kernel(self, x: Tensor) -> Tensor:
        """By PyTorch's own kernel."""
        return torch._weight_int8pack_mm(x, self.weight, self.scales)  # noqa: SLF001  it has no other name

    def widened(self, x: Tensor) -> Tensor:
        """With the weight in the activations' type."""
        parts = [functional.linear(x, part.to(x.dtype)) for part in torch.split(self.weight, _TILE)]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).mul_(self.scales)
