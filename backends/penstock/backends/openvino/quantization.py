"""Rounding of weights: to int8 with a scale a row, and to 4 bits with a scale and a zero point for each group of a row."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["FORM", "Groups", "Rows", "group_size", "quantize_groups", "quantize_rows"]

# Elements that one thread rounds at a time: their float32 copies stay within the caches' reach.
_ELEMENTS = 1 << 17
_TINY = np.finfo(np.float32).tiny
_GROUP_SIZES = (128, 64, 32)
_HIGHEST = 15  # of 4 bits without a sign

FORM = f"1-rows-groups{_GROUP_SIZES[0]}"
"""How weights are rounded; those that were kept in another form are of no use. Its number goes up with every change of the rule."""


class Rows(NamedTuple):
    """A matrix in 8 bits: element = value · scale of its row.

    Attributes:
        values: int8 [rows, columns], -127 … 127.
        scales: float32 [rows, 1].
    """

    values: NDArray[np.int8]
    scales: NDArray[np.float32]


class Groups(NamedTuple):
    """A matrix in 4 bits: element = (value - zero) · scale of its group.

    Attributes:
        values: uint8 [rows, columns / 2], two a byte, the first one in the lower half.
        zeros: uint8 [rows, groups, 1], 0 … 15.
        scales: float32 [rows, groups, 1].
    """

    values: NDArray[np.uint8]
    zeros: NDArray[np.uint8]
    scales: NDArray[np.float32]


def group_size(*widths: int) -> int | None:
    """The longest group that all of these widths divide into: 128, 64 or 32; None where none does."""
    return next((size for size in _GROUP_SIZES if not any(width % size for width in widths)), None)


def quantize_rows(parts: Sequence[NDArray[Any]], out: Rows, pool: ThreadPoolExecutor) -> None:
    """Round matrices, one below the other, to int8, symmetrically, with one scale a row.

    Args:
        parts: [rows, columns] each.
        out: takes the result.
        pool: computes.
    """
    values, scales = out

    def quantize(exact: NDArray[np.float32], into: slice) -> None:
        scale = np.maximum(exact.max(1, keepdims=True), -exact.min(1, keepdims=True)) / 127
        scale[scale < _TINY] = 1  # no precision is left below: such rows become zeros
        np.rint(np.divide(exact, scale, out=exact), out=exact)
        values[into], scales[into] = exact, scale

    _each(quantize, parts, pool)


def quantize_groups(parts: Sequence[NDArray[Any]], out: Groups, pool: ThreadPoolExecutor) -> None:
    """Round matrices, one below the other, to 4 bits over each group's own range, widened to hold zero, which stays exact.

    Args:
        parts: [rows, columns] each.
        out: takes the result; its groups divide the columns.
        pool: computes.
    """
    values, zeros, scales = out
    groups, columns = scales.shape[1], parts[0].shape[1]

    def quantize(exact: NDArray[np.float32], into: slice) -> None:
        exact = exact.reshape(len(exact), groups, -1)
        low = np.minimum(exact.min(2, keepdims=True), 0)
        high = np.maximum(exact.max(2, keepdims=True), 0)
        scale = (high / _HIGHEST) - (low / _HIGHEST)
        scale[scale < _TINY] = 1
        zero = np.rint(-low / scale)
        np.rint(np.divide(exact, scale, out=exact), out=exact)
        np.clip(np.add(exact, zero, out=exact), 0, _HIGHEST, out=exact)
        whole = exact.astype(np.uint8).reshape(-1, columns // 2, 2)
        values[into] = whole[..., 0] | (whole[..., 1] << 4)
        zeros[into], scales[into] = zero, scale

    _each(quantize, parts, pool)


def _each(quantize: Any, parts: Sequence[NDArray[Any]], pool: ThreadPoolExecutor) -> None:
    """Call `quantize` with a float32 copy of some rows, and where among all rows they belong."""

    def run(part: NDArray[Any], start: int, offset: int) -> None:
        exact = part[start : start + step].astype(np.float32)
        quantize(exact, slice(offset + start, offset + start + len(exact)))

    step, offset, tasks = max(1, _ELEMENTS // parts[0].shape[1]), 0, []
    for part in parts:
        tasks += [pool.submit(run, part, start, offset) for start in range(0, len(part), step)]
        offset += len(part)
    for task in tasks:
        task.result()
