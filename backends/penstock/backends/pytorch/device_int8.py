"""Products on an accelerator with weights of eight bits and bfloat16 activations."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from penstock.backends.pytorch.products import Int8Product
from penstock.backends.pytorch.timing import Timed
from penstock.common.logs import logger

__all__ = ["DeviceInt8Product", "kernel_rows"]

_TILE = 8192  # outputs that are widened at a time
_MOST_KERNEL_ROWS = 64
_TOLERANCE = 0.02  # root-mean-square error over the answer's own: bfloat16's rounding, and nothing more


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


def kernel_rows(outputs: int, inputs: int, device: torch.device, timed: Timed) -> int:
    """Up to how many rows PyTorch's kernel is right and quicker than widening, for a weight of this shape; 0 where it never is.

    Powers of two are tried until it is not; what came of each is logged.
    """
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=random).bfloat16()
    product = DeviceInt8Product(weight.to(device), None, rows=0)
    found, told, rows = 0, [], 1
    while rows <= _MOST_KERNEL_ROWS:
        x = torch.randn(rows, inputs, generator=random).bfloat16()
        seconds, answers = [], []
        try:
            for way in (product.by_kernel, product.widened):
                answer, taken = timed(partial(way, x.to(device)))
                answers.append(answer.float())
                seconds.append(taken)
        except Exception as error:  # noqa: BLE001  whatever the kernel raises here, widening does without it
            told.append(f"{rows}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            break
        off = float((answers[0] - answers[1]).square().mean().sqrt() / answers[1].square().mean().sqrt())
        told.append(f"{rows}: {seconds[0] * 1e6:.0f} us, widened {seconds[1] * 1e6:.0f} us, {off:.2g} apart")
        if not (off <= _TOLERANCE and seconds[0] < seconds[1]):
            break
        found, rows = rows, rows * 2
    logger().info("int8 product chosen", device=str(device), kernel_rows=found, tried=told)
    return found
