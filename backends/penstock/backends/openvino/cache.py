"""The KV cache: two arrays a layer in host memory, which the graph reads and writes in place."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import openvino as ov
from penstock.backends.contract import CANONICAL_DTYPES, KvChunk, KvSpec
from penstock.backends.kv_blocks import check_chunk, transfer_slots
from penstock.backends.openvino.kv_rounding import HEADER, round_rows, unrounded
from penstock.backends.openvino.weights import shared_tensor
from penstock.common.service import StartError

__all__ = ["BLOCK_SIZE", "LAYOUT", "PagedCache"]

BLOCK_SIZE = 32  # the plug-in's own; it has no other
LAYOUT = "block.head.slot.dim"

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
        kv: how large it is and what it holds.
    """

    def __init__(self, compiled: ov.CompiledModel, blocks: int) -> None:
        ports = [port for port in compiled.inputs if port.any_name.startswith(("key.", "value."))]
        dtype = ports[0].element_type.to_string()
        self._type, self._rounded = _TYPES[dtype], dtype == "u8"
        shape = heads, _, width = [dimension.get_length() for dimension in list(ports[0].partial_shape)[1:]]
        self.kv = KvSpec(
            block_size=BLOCK_SIZE,
            blocks=blocks,
            bytes_per_block=len(ports) * math.prod(shape) * self._type.itemsize,
            layout=LAYOUT,
            dtype=dtype,
            token_shape=(len(ports) // 2, heads, width - HEADER if self._rounded else width),
            # What 8 bits stand for, a difference times a scale, is in general no number of 16 bits.
            canonical_dtype="float32" if self._rounded else self._type.name,
        )
        self._arrays: dict[str, NDArray[Any]] = {port.any_name: _allocate((blocks, *shape), self._type) for port in ports}
        self.tensors = {name: shared_tensor(array) for name, array in self._arrays.items()}

    def read(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """Copy `tokens` out, which are positions in a sequence whose blocks these are; in float32 where the cache is rounded.

        Raises:
            ValueError: they are not consecutive positions within the blocks, or a block is none of the cache's.
        """
        held, slots = self._locate(blocks, tokens)
        data = np.empty(self.kv.canonical_shape(len(tokens)), CANONICAL_DTYPES[self.kv.canonical_dtype])
        for layer in range(len(data)):
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
        check_chunk(self.kv, chunk)
        for layer in range(len(chunk.data)):
            for kind, name in enumerate(("key", "value")):
                rows = chunk.data[layer, kind]
                rows = round_rows(rows) if self._rounded else rows.astype(self._type, copy=False)
                self._arrays[f"{name}.{layer}"][held, :, slots] = rows

    def _locate(self, blocks: Sequence[int], tokens: range) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The block and the slot of each token."""
        slots = transfer_slots(self.kv, blocks, tokens)
        return slots // BLOCK_SIZE, slots % BLOCK_SIZE
