"""Memory for keys and values, laid out so that TensorRT can be bound to each layer of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penstock.backends.architectures.spec import DecoderSpec

__all__ = ["ALIGNMENT", "aligned_rows", "kv_rows"]

ALIGNMENT = 256
"""Bytes at multiples of which TensorRT wants every tensor to begin."""


def aligned_rows(rows: int, row_bytes: int) -> int:
    """The least number of rows, not less than `rows`, behind which the next row is aligned."""
    step = ALIGNMENT // math.gcd(ALIGNMENT, row_bytes)
    return -(-rows // step) * step


def kv_rows(spec: DecoderSpec, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[layers, 2 (key, value), at least `rows`, kv heads, head dim], not cleared; each layer's keys and values begin aligned."""
    held = aligned_rows(rows, spec.kv_heads * spec.head_dim * dtype.itemsize)
    return torch.empty((spec.layers, 2, held, spec.kv_heads, spec.head_dim), dtype=dtype, device=device)
