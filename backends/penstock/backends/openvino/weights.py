"""Weights as constants of a graph: held in the type that was asked for, without a second copy where the checkpoint allows."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import openvino as ov
from openvino import opset13 as ops
from penstock.backends.contract import DType

__all__ = ["Constants", "quantize_rows", "shared_tensor"]

_BF16 = np.dtype(ml_dtypes.bfloat16)
# Rows that one thread quantises at a time: their float32 copy stays within the caches' reach.
_ROWS = 1024


def shared_tensor(array: NDArray[Any]) -> ov.Tensor:
    """A tensor over an array's own memory. The array must outlive it: the runtime keeps no reference."""
    if array.dtype == _BF16:  # no type of numpy's own: handed over as bits
        return ov.Tensor(array.view(np.uint16), ov.Shape(array.shape), ov.Type.bf16)
    return ov.Tensor(array, ov.Shape(array.shape), ov.Type(array.dtype))  # read-only arrays are welcome by this signature alone


def quantize_rows(matrix: NDArray[Any], pool: ThreadPoolExecutor) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round to int8, symmetrically, with one scale a row: matrix ≈ values · scales.

    Returns:
        Values int8 [rows, columns] in -127 … 127 and scales float32 [rows, 1].
    """
    values = np.empty(matrix.shape, np.int8)
    scales = np.empty((matrix.shape[0], 1), np.float32)

    def quantize(start: int) -> None:
        rows = slice(start, start + _ROWS)
        exact = matrix[rows].astype(np.float32)
        scale = np.maximum(exact.max(1, keepdims=True), -exact.min(1, keepdims=True)) / 127
        scale[scale < np.finfo(np.float32).tiny] = 1  # no precision is left below: such rows become zeros
        np.rint(np.divide(exact, scale, out=exact), out=exact)
        values[rows], scales[rows] = exact, scale

    list(pool.map(quantize, range(0, matrix.shape[0], _ROWS)))
    return values, scales


class Constants:
    """Makes constants from a checkpoint's tensors and keeps what they point into.

    Attributes:
        dtype: the type that matrices are held in.
        held: every array that constants share memory with; must live as long as the compiled graph.
    """

    def __init__(self, weights: Mapping[str, NDArray[Any]], dtype: DType, threads: int) -> None:
        self.held: list[NDArray[Any]] = []
        self._weights = weights
        self.dtype = dtype
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="quantize")

    def close(self) -> None:
        self._pool.shutdown()

    def vector(self, *names: str) -> ov.Node:
        """One-dimensional tensors end to end, float32."""
        return ops.constant(np.concatenate([self._weights[name] for name in names]).astype(np.float32))

    def matrix(self, *names: str) -> ov.Node:
        """Matrices [rows, columns] one below the other, to be multiplied from the right, transposed: bfloat16 or float32."""
        parts = [self._weights[name] for name in names]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        match self.dtype:
            case DType.INT8:
                values, scales = quantize_rows(joined, self._pool)
                return ops.multiply(ops.convert(self._shared(values), "f32"), ops.constant(scales))
            case DType.BF16:
                return self._shared(joined.astype(_BF16, copy=False))
            case _:
                return self._shared(joined.astype(np.float32, copy=False))

    def table(self, name: str) -> ov.Node:
        """A matrix to gather rows from, in the checkpoint's own type: only pages that are looked at are ever read."""
        return self._shared(self._weights[name])

    def _shared(self, array: NDArray[Any]) -> ov.Node:
        self.held.append(array)
        return ops.constant(shared_tensor(array), shared_memory=True)
