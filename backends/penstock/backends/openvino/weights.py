"""Weights as constants of a graph: held in the type that was asked for, without a second copy where the checkpoint allows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import openvino as ov
from openvino import opset13 as ops
from penstock.backends.contract import DType
from penstock.backends.mapped_arrays import MappedArrays
from penstock.backends.openvino.quantization import Groups, Rows, group_size, quantize_groups, quantize_rows
from penstock.backends.safetensors import Weights

__all__ = ["Constants", "shared_tensor"]

_BF16 = np.dtype(ml_dtypes.bfloat16)
_SPARE_ROWS = 8
_ALWAYS_ONE_LAYOUT = 16 << 20


def shared_tensor(array: NDArray[Any]) -> ov.Tensor:
    """A tensor over an array's own memory. The array must outlive it: the runtime keeps no reference."""
    if array.dtype == _BF16:  # no type of numpy's own: handed over as bits
        return ov.Tensor(array.view(np.uint16), ov.Shape(array.shape), ov.Type.bf16)
    return ov.Tensor(array, ov.Shape(array.shape), ov.Type(array.dtype))  # read-only arrays are welcome by this signature alone


class Constants:
    """Makes constants from a checkpoint's tensors and keeps what they point into.

    Args:
        has_bf16: whether the processor multiplies bfloat16. Where it does not, products widen it as they go.

    Attributes:
        dtype: the type that matrices are held in.
        held: every array that constants share memory with; must live as long as the compiled graph.
    """

    def __init__(self, weights: Weights, arrays: MappedArrays, dtype: DType, threads: int, *, has_bf16: bool) -> None:
        self.held: list[NDArray[Any]] = []
        self._weights, self._arrays = weights, arrays
        self._has_bf16 = has_bf16
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
            return self._by_group(names, parts, size)
        if self.dtype.quantised:
            return self._by_row(names, parts)
        return self._whole(names, parts)

    def head(self, name: str) -> ov.Node:
        """The matrix that makes logits: as `matrix`, but of 8 bits where others have 4."""
        return self._by_row((name,), [self._weights[name]]) if self.dtype is DType.INT4 else self.matrix(name)

    def _whole(self, names: Sequence[str], parts: Sequence[NDArray[Any]]) -> ov.Node:
        dtype = _BF16 if self.dtype is DType.BF16 else np.dtype(np.float32)
        widened = self.dtype is DType.BF16 and not self._has_bf16
        rows = sum(map(len, parts))
        held_rows = _held_rows(parts) if widened else rows
        if len(parts) == 1 and parts[0].dtype == dtype and held_rows == rows:
            matrix = self._shared(parts[0])
        else:
            joined, filled = self._array(names, "", (held_rows, parts[0].shape[1]), dtype)
            if not filled:
                np.concatenate(parts, out=joined[:rows])
                self._release()
            matrix = self._shared(joined)
        return _widened(matrix) if widened else matrix

    def _by_row(self, names: Sequence[str], parts: Sequence[NDArray[Any]]) -> ov.Node:
        rows, columns = _held_rows(parts), parts[0].shape[1]
        values, filled = self._array(names, ".int8", (rows, columns), np.int8)
        scales, _ = self._array(names, ".scales", (rows, 1), np.float32)
        if not filled:
            quantize_rows(parts, Rows(values, scales), self._pool)
            scales[sum(map(len, parts)) :] = 1
            self._release()
        return ops.multiply(ops.convert(self._shared(values), "f32"), self._shared(scales))

    def _by_group(self, names: Sequence[str], parts: Sequence[NDArray[Any]], size: int) -> ov.Node:
        """The form that the plug-in keeps in 4 bits: values less zero points, times scales, by group, then as a matrix."""
        rows, columns = _held_rows(parts), parts[0].shape[1]
        groups = (rows, columns // size, 1)
        values, filled = self._array(names, ".uint4", (rows, columns // 2), np.uint8)
        zeros, _ = self._array(names, ".zeros", groups, np.uint8)
        scales, _ = self._array(names, ".scales", groups, np.float32)
        if not filled:
            quantize_groups(parts, Groups(values, zeros, scales), self._pool)
            scales[sum(map(len, parts)) :] = 1
            self._release()
        self.held.append(values)
        packed = ops.constant(ov.Tensor(values, ov.Shape([*groups[:2], size]), ov.Type.u4), shared_memory=True)
        centred = ops.subtract(ops.convert(packed, "f32"), ops.convert(self._shared(zeros), "f32"))
        exact = ops.multiply(centred, self._shared(scales))
        return ops.reshape(exact, ops.constant(np.array([rows, columns])), special_zero=False)

    def _array(self, names: Sequence[str], kind: str, shape: tuple[int, ...], dtype: Any) -> tuple[NDArray[Any], bool]:
        return self._arrays.array("+".join(names) + kind, shape, dtype), self._arrays.complete

    def _release(self) -> None:
        """What was read and written is not needed before the plug-in looks at it."""
        self._weights.release()
        self._arrays.release()

    def _shared(self, array: NDArray[Any]) -> ov.Node:
        self.held.append(array)
        return ops.constant(shared_tensor(array), shared_memory=True)


def _widened(matrix: ov.Node) -> ov.Node:
    """In float32, as each product makes it anew: marked as exporters mark it, lest the plug-in makes it once and keeps it.

    The plug-in heeds that with AVX2, in graphs that have paged attention.
    """
    wide = ops.convert(matrix, "f32")
    wide.get_rt_info()["decompression_0"] = ""
    return wide


def _held_rows(parts: Sequence[NDArray[Any]]) -> int:
    """How many rows a matrix is held with that products widen: its own, and where that saves memory eight of zeros behind them.

    For steps of 7 to 80 tokens the plug-in's library takes another block of rows, and a second copy of the matrix packed for it,
    where float32 would take less than 16 MiB and the number of rows divides by 32.
    """
    rows, columns = sum(map(len, parts)), parts[0].shape[1]
    return rows + _SPARE_ROWS if rows * columns * 4 < _ALWAYS_ONE_LAYOUT and rows % 32 == 0 else rows
