"""The KV cache: two arrays a layer in host memory, which the graph reads and writes in place."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import openvino as ov
from penstock.backends.contract import KvChunk
from penstock.backends.openvino.kv_rounding import HEADER, round_rows, unrounded
from penstock.backends.openvino.weights import shared_tensor
from penstock.common.service import StartError

__all__ = ["BLOCK_SIZE", "PagedCache"]

BLOCK_SIZE = 32  # the plug-in's own; it has no other

_TYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "u8": np.dtype(np.uint8),
}


def _allocate(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """An array in memory of its own, of huge pages where the system has them on request.

    Raises:
        StartError: the system has not so much.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    try:
        memory = mmap.mmap(-1, size)
    except (OSError, OverflowError) as error:
        raise StartError(f"the KV cache does not fit into memory ({size >> 20} MiB of it for one layer); ask for less") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)  # keeps the mapping alive


class PagedCache:
    """Blocks of keys and values, [block, kv head, slot, head dim] for each layer and kind.

    The arrays are not written when they are made, so memory is taken as blocks are first used: in pages of 2 MiB where the system
    gives them. Blocks that nothing has used yet are what a prompt takes while the prefix cache keeps all others; a
    prefill of 512 tokens would first touch some 14,000 pages of 4 KiB.

    Attributes:
        tensors: by the name of the graph's input.
        bytes_per_block: over all layers, keys and values.
    """

    def __init__(self, compiled: ov.CompiledModel, blocks: int) -> None:
        ports = [port for port in compiled.inputs if port.any_name.startswith(("key.", "value."))]
        self.layers, self._blocks = len(ports) // 2, blocks
        self.dtype = ports[0].element_type.to_string()
        self._type = _TYPES[self.dtype]
        self._shape = tuple(dimension.get_length() for dimension in list(ports[0].partial_shape)[1:])
        self._rounded = self.dtype == "u8"
        self._chunk_type = np.dtype(np.float32) if self._rounded else self._type
        self._arrays: dict[str, NDArray[Any]] = {port.any_name: _allocate((blocks, *self._shape), self._type) for port in ports}
        self.tensors = {name: shared_tensor(array) for name, array in self._arrays.items()}
        self.bytes_per_block = len(ports) * int(np.prod(self._shape)) * self._type.itemsize

    def read(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """Copy `tokens` out, which are positions in a sequence whose blocks these are; in float32 where the cache is rounded.

        Raises:
            ValueError: they are not consecutive positions within the blocks, or a block is none of the cache's.
        """
        held, slots = self._locate(blocks, tokens)
        data = np.empty(self._chunk_shape(tokens), self._chunk_type)
        for layer in range(self.layers):
            for kind, name in enumerate(("key", "value")):
                rows = self._arrays[f"{name}.{layer}"][held, :, slots]
                data[layer, kind] = unrounded(rows) if self._rounded else rows
        return KvChunk(tokens, data)

    def write(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Copy a chunk in, converted to this cache's type.

        Raises:
            ValueError: its positions are not within the blocks, a block is none of the cache's, or its shape is not this model's.
        """
        held, slots = self._locate(blocks, chunk.tokens)
        expected = self._chunk_shape(chunk.tokens)
        if chunk.data.shape != expected:
            raise ValueError(f"a chunk of shape {chunk.data.shape} does not fit: {expected}")
        for layer in range(self.layers):
            for kind, name in enumerate(("key", "value")):
                rows = chunk.data[layer, kind]
                rows = round_rows(rows) if self._rounded else rows.astype(self._type, copy=False)
                self._arrays[f"{name}.{layer}"][held, :, slots] = rows

    def _chunk_shape(self, tokens: range) -> tuple[int, ...]:
        heads, _, width = self._shape
        return self.layers, 2, len(tokens), heads, width - HEADER if self._rounded else width

    def _locate(self, blocks: Sequence[int], tokens: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The block and the slot of each token."""
        if tokens.step != 1 or not 0 <= tokens.start <= tokens.stop <= len(blocks) * BLOCK_SIZE:
            raise ValueError(f"{tokens} are not consecutive positions within {len(blocks)} blocks of {BLOCK_SIZE}")
        ids = np.asarray(blocks, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self._blocks:
            raise ValueError(f"blocks {ids.min()} … {ids.max()} are not all of the cache's {self._blocks}")
        positions = np.arange(tokens.start, tokens.stop)
        return ids[positions // BLOCK_SIZE], positions % BLOCK_SIZE
