"""Up to how many rows an accelerator's kernel for short weights is the quickest way of a product, found by asking it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from penstock.backends.pytorch.timing import Timed
from penstock.common.logs import logger

__all__ = ["MakeShortProduct", "ShortProduct", "kernel_rows"]

_MOST_KERNEL_ROWS = 64
_TOLERANCE = 0.02  # root-mean-square error over the answer's own: bfloat16's rounding, and nothing more


class ShortProduct(Protocol):
    """A product with weights of fewer bits than its activations, [T, inputs] to [T, outputs], in two ways."""

    def by_kernel(self, x: Tensor) -> Tensor:
        """By a kernel that takes such weights."""
        ...

    def widened(self, x: Tensor) -> Tensor:
        """With the weight in the activations' type."""
        ...


MakeShortProduct = Callable[[Tensor, Tensor | None, int], ShortProduct]
"""Makes a product of a weight [outputs, inputs] and a bias, up to so many rows of which go through the kernel."""


def kernel_rows(name: str, make: MakeShortProduct, outputs: int, inputs: int, device: torch.device, timed: Timed) -> int:
    """Up to how many rows the kernel is right and quicker than widening, for a weight of this shape; 0 where it never is.

    Powers of two are tried until it is not; what came of each is logged, under the product's name. What is right is what a product
    gives that is made to do without the kernel.
    """
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=random).bfloat16().to(device)
    without, product = make(weight, None, 0), None
    found, tried, rows = 0, [], 1
    while rows <= _MOST_KERNEL_ROWS:
        x = torch.randn(rows, inputs, generator=random).bfloat16().to(device)
        right, seconds, off = without.widened(x), [], 0.0
        try:
            product = product or make(weight, None, _MOST_KERNEL_ROWS)
            for way in (product.by_kernel, product.widened):
                answer, taken = timed(partial(way, x))
                seconds.append(taken)
                off = max(off, _apart(answer, right))
        except Exception as error:  # noqa: BLE001  whatever the kernel raises here, widening does without it
            tried.append(f"{rows}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
            break
        tried.append(f"{rows}: {seconds[0] * 1e6:.0f} us, widened {seconds[1] * 1e6:.0f} us, {off:.2g} apart")
        if not (off <= _TOLERANCE and seconds[0] < seconds[1]):
            break
        found, rows = rows, rows * 2
    logger().info(f"{name} product chosen", device=str(device), kernel_rows=found, tried=tried)
    return found


def _apart(answer: Tensor, right: Tensor) -> float:
    return float((answer.float() - right.float()).square().mean().sqrt() / right.float().square().mean().sqrt())
