"""Weights as initialisers of a graph: as they are computed with, or whole numbers in blocks of a row that share a scale.

The graph names them and nothing more; whoever runs it hands the arrays over, so no weight goes through a serialised model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import DType
from penstock.backends.mapped_arrays import MappedArrays

__all__ = ["BITS", "BLOCKS", "FORM", "Quantized", "WeightSource", "quantize_blocks"]

BITS: Mapping[DType, int] = {DType.INT8: 8, DType.INT4: 4}
"""Bits of a weight, of the types that are quantised."""

_FLOAT32 = np.dtype(np.float32)
_LEAST_BLOCK = 16  # of MatMulNBits
# A block's scale costs the kernels time beside its bytes: with 4 bits, 64 columns are an eighth slower than 128 for one sequence,
# and a fifth for prompts. Beyond 128, which checkpoints of 4 bits mostly have, speed would be paid for in quality.
BLOCKS: Mapping[int, int] = {8: 256, 4: 128}
"""Columns that share a scale, by a weight's bits."""
FORM = "-".join(("1", *(f"{bits}x{size}" for bits, size in BLOCKS.items())))
"""How weights are rounded; those that were kept in another form are of no use. Its number goes up with every change of the rule."""

# Rows that one thread quantises at a time: their float32 copy stays within the caches' reach.
_ROWS = 512


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix [rows, columns] in the form of MatMulNBits.

    Attributes:
        values: uint8 [rows, blocks, block size * bits / 8], the lower half of a byte first; zero is in the middle.
        scales: [rows, blocks], of the type that is computed with.
    """

    values: NDArray[np.uint8]
    scales: NDArray[Any]
    columns: int
    bits: int
    block_size: int


def quantize_blocks(
    matrix: NDArray[Any], bits: int, values: NDArray[np.uint8], scales: NDArray[Any], pool: ThreadPoolExecutor
) -> None:
    """Round each block of a row to whole numbers times a scale: matrix ≈ (values - 2^(bits - 1)) · scales.

    The scale is signed, such that the block's element of largest size becomes -2^(bits - 1): of the numbers that there are, that
    is the one whose opposite is missing, so none goes unused.

    Args:
        matrix: [rows, columns].
        bits: 4 or 8.
        values: [rows, blocks, block size * bits / 8], to be filled.
        scales: [rows, blocks], to be filled.
        pool: computes.
    """
    rows, columns = matrix.shape
    blocks, half = values.shape[1], 1 << (bits - 1)
    block_size = values.shape[2] * 8 // bits

    def quantize(start: int) -> None:
        stop = min(start + _ROWS, rows)
        exact = np.zeros((stop - start, blocks * block_size), np.float32)
        exact[:, :columns] = matrix[start:stop]
        exact = exact.reshape(stop - start, blocks, block_size)
        high, low = exact.max(-1), exact.min(-1)
        scale = np.where(high > -low, high, low) / -half
        scale[np.abs(scale) < np.finfo(np.float32).tiny] = 1  # no precision is left below: such blocks become zeros
        np.rint(np.divide(exact, scale[..., None], out=exact), out=exact)
        whole = (np.minimum(exact, half - 1, out=exact) + half).astype(np.uint8)
        values[start:stop] = whole if bits == 8 else whole[..., ::2] | (whole[..., 1::2] << 4)
        scales[start:stop] = scale

    list(pool.map(quantize, range(0, rows, _ROWS)))


class WeightSource:
    """Makes initialisers from a checkpoint's tensors, and keeps them by name.

    Attributes:
        dtype: the type that matrices are held in.
        compute: the type of all else, and of matrices that are not quantised.
        arrays: every initialiser made so far.
    """

    def __init__(
        self,
        weights: Mapping[str, NDArray[Any]],
        dtype: DType,
        threads: int,
        memory: MappedArrays,
        compute: np.dtype[Any] = _FLOAT32,
    ) -> None:
        self.dtype, self.compute = dtype, compute
        self.arrays: dict[str, NDArray[Any]] = {}
        self._weights, self._memory = weights, memory
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="quantize")

    def close(self) -> None:
        self._pool.shutdown()

    def keep(self, name: str, array: NDArray[Any]) -> str:
        """Keep an array under a name, once."""
        self.arrays.setdefault(name, array)
        return name

    def vector(self, *names: str) -> str:
        """One-dimensional tensors end to end; its name."""
        return self.keep("|".join(names), np.concatenate([self._weights[name] for name in names]).astype(self.compute))

    def table(self, name: str) -> str:
        """A matrix to gather rows from, in the checkpoint's own type: only pages that are looked at are ever read; its name."""
        return self.keep(f"{name}.table", self._weights[name])

    def exact(self, *names: str) -> str:
        """Matrices one below the other; its name."""
        parts = self._parts(names)
        if len(parts) == 1 and parts[0].dtype == self.compute:
            return self.keep(names[0], parts[0])
        name, rows = "|".join(names), sum(len(part) for part in parts)
        out = self._memory.array(name, (rows, parts[0].shape[1]), self.compute)
        np.concatenate(parts, out=out, casting="unsafe")  # numpy knows no order between float16 and bfloat16
        return self.keep(name, out)

    def quantized(self, *names: str) -> tuple[str, str, Quantized]:
        """Matrices one below the other, quantised; names of values and scales."""
        parts, bits = self._parts(names), BITS[self.dtype]
        rows, columns = sum(len(part) for part in parts), parts[0].shape[1]
        block_size = _block_size(columns, bits)
        blocks = -(-columns // block_size)
        name = f"{'|'.join(names)}|{bits}x{block_size}"
        values = self._memory.array(f"{name}|values", (rows, blocks, block_size * bits // 8), np.uint8)
        scales = self._memory.array(f"{name}|scales", (rows, blocks), self.compute)
        first = 0
        for part in () if self._memory.complete else parts:
            own = slice(first, first := first + len(part))
            quantize_blocks(part, bits, values[own], scales[own], self._pool)
        matrix = Quantized(values, scales, columns, bits, block_size)
        return self.keep(f"{name}|values", values), self.keep(f"{name}|scales", scales), matrix

    def _parts(self, names: Sequence[str]) -> list[NDArray[Any]]:
        return [self._weights[name] for name in names]


def _block_size(columns: int, bits: int) -> int:
    """The longest block of the usual ones that a row divides into."""
    size = BLOCKS[bits]
    while size > _LEAST_BLOCK and columns % size:
        size //= 2
    return size
