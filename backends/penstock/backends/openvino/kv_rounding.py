"""Keys and values of 8 bits as the plug-in's paged attention has them: each token of each head with its own scale and offset.

A row is eight bytes, scale and offset in float32, and then a byte for each dimension: element = (byte - offset) · scale. So a row
depends on its own token alone, however a prompt was cut into chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORM", "HEADER", "round_rows", "unrounded"]

HEADER = 8
"""Bytes before a row's values."""

FORM = "uint8 behind float32 scale and offset of each token and head"
"""The name of such rows."""

_STEPS = 255
_TINY = np.finfo(np.float32).tiny


def unrounded(rows: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Rows [..., HEADER + dim] as float32 [..., dim]."""
    scale, offset = _header(rows)
    return (rows[..., HEADER:].astype(np.float32) - offset) * scale


def round_rows(exact: NDArray[Any]) -> NDArray[np.uint8]:
    """Elements [..., dim] as rows [..., HEADER + dim], each over its own range."""
    exact = exact.astype(np.float32)
    low, high = exact.min(-1, keepdims=True), exact.max(-1, keepdims=True)
    scale = (high / _STEPS) - (low / _STEPS)
    scale[scale < _TINY] = 1
    offset = -low / scale
    rows = np.empty((*exact.shape[:-1], HEADER + exact.shape[-1]), np.uint8)
    rows[..., :HEADER] = np.concatenate([scale, offset], -1).view(np.uint8)
    rows[..., HEADER:] = np.clip(np.rint(exact / scale + offset), 0, _STEPS)
    return rows


def _header(rows: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    both = np.ascontiguousarray(rows[..., :HEADER]).view(np.float32)
    return both[..., :1], both[..., 1:]
