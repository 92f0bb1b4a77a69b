"""Products on a processor that multiplies bfloat16: the weight lies in memory as oneDNN's kernels read it.

From a weight in its usual layout PyTorch's product gathers for every call what the kernel needs, which for a few rows takes as
long as the arithmetic. Here it is packed once, by the operators that PyTorch's own compiler does that with.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PackedProduct"]


class PackedProduct(nn.Module):
    """A linear map of bfloat16 activations, [T, inputs] to [T, outputs]."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight, None))  # noqa: SLF001  it has no other name
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """The product, with the bias where there is one."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")  # noqa: SLF001  the same
        return out
