"""Weights as constants of a graph: held in the type that was asked for, without a second copy where the checkpoint allows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import openvino as ov
from openvino import opset13 as ops
from penstock.backends.contract import DType
from penstock.backends.openvino.quantization import group_size, quantize_groups, quantize_rows

__all__ = ["Constants", "shared_tensor"]

_BF16 = np.dtype(ml_dtypes.bfloat16)


def shared_tensor(array: NDArray[Any]) -> ov.Tensor:
    """A tensor over an array's own memory. The array must outlive it: the runtime keeps no reference."""
    if array.dtype == _BF16:  # no type of numpy's own: handed over as bits
        return ov.Tensor(array.view(np.uint16), ov.Shape(array.shape), ov.Type.bf16)
    return ov.Tensor(array, ov.Shape(array.shape), ov.Type(array.dtype))  # read-only arrays are welcome by this signature alone


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
        size = group_size(parts[0].shape[1])
        if self.dtype is DType.INT4 and size is not None:
            return self._grouped(parts, size)
        if self.dtype in (DType.INT4, DType.INT8):
            return self._by_row(parts)
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._shared(joined.astype(_BF16 if self.dtype is DType.BF16 else np.float32, copy=False))

    def head(self, name: str) -> ov.Node:
        """The matrix that makes logits: as `matrix`, but of 8 bits where others have 4."""
        return self._by_row([self._weights[name]]) if self.dtype is DType.INT4 else self.matrix(name)

    def table(self, name: str) -> ov.Node:
        """A matrix to gather rows from, in the checkpoint's own type: only pages that are looked at are ever read."""
        return self._shared(self._weights[name])

    def _by_row(self, parts: Sequence[NDArray[Any]]) -> ov.Node:
        values, scales = quantize_rows(parts, self._pool)
        return ops.multiply(ops.convert(self._shared(values), "f32"), ops.constant(scales))

    def _grouped(self, parts: Sequence[NDArray[Any]], size: int) -> ov.Node:
        """The form that the plug-in keeps in 4 bits: values less zero points, times scales, by group, then as a matrix."""
        values, zeros, scales = quantize_groups(parts, size, self._pool)
        self.held.append(values)
        shape = [len(values), values.shape[1] * 2 // size, size]
        packed = ops.constant(ov.Tensor(values, ov.Shape(shape), ov.Type.u4), shared_memory=True)
        centred = ops.subtract(ops.convert(packed, "f32"), ops.convert(ops.constant(zeros), "f32"))
        exact = ops.multiply(centred, ops.constant(scales))
        return ops.reshape(exact, ops.constant(np.array([shape[0], shape[1] * size])), special_zero=False)

    def _shared(self, array: NDArray[Any]) -> ov.Node:
        self.held.append(array)
        return ops.constant(shared_tensor(array), shared_memory=True)
