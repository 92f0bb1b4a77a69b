"""Keys and values of 8 bits as the plug-in's paged attention has them: each token of each head with its own scale and offset.

A row is eight bytes, scale and offset in float32, and then a byte for each dimension: element = (byte - offset) · scale. So a row
depends on its own token alone, however a prompt was cut into chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORM", "HEADER", "round_to", "unround"]

HEADER = 8
"""Bytes before a row's values."""

FORM = "uint8 behind float32 scale and offset of each token and head"
"""The name of such rows."""

_STEPS = 255
_TINY = np.finfo(np.float32).tiny


def unround(rows: NDArray[np.uint8], exact: NDArray[np.float32]) -> None:
    """Write what rows [..., HEADER + dim] stand for into [..., dim]."""
    header = np.ascontiguousarray(rows[..., :HEADER]).view(np.float32)
    exact[...] = rows[..., HEADER:]
    exact -= header[..., 1:]
    exact *= header[..., :1]


def round_to(rows: NDArray[np.uint8], exact: NDArray[Any]) -> None:
    """Write elements [..., dim] as rows [..., HEADER + dim], each over its own range."""
    exact = exact.astype(np.float32, copy=False)
    low, high = exact.min(-1, keepdims=True), exact.max(-1, keepdims=True)
    scale = (high / _STEPS) - (low / _STEPS)
    scale[scale < _TINY] = 1
    offset = -low / scale
    rows[..., :HEADER] = np.concatenate([scale, offset], -1).view(np.uint8)
    values = exact / scale
    values += offset
    np.rint(values, out=values)
    rows[..., HEADER:] = np.clip(values, 0, _STEPS, out=values)
