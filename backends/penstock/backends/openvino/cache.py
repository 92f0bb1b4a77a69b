"""The KV cache: two arrays a layer in host memory, which the graph reads and writes in place."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import openvino as ov
from penstock.backends.contract import KvChunk, KvSpec
from penstock.backends.kv_blocks import check_chunk, check_transfer
from penstock.backends.kv_copies import converted, native_layout, pieces, read_blocks, read_tokens, write_blocks, write_tokens
from penstock.backends.openvino.kv_rounding import FORM, HEADER, round_to, unround
from penstock.backends.openvino.weights import shared_tensor
from penstock.common.service import StartError

__all__ = ["BLOCK_SIZE", "LAYOUT", "PagedCache"]

BLOCK_SIZE = 32  # the plug-in's own; it has no other
LAYOUT = "block.head.slot.dim"

_PART = 1 << 18  # values

_TYPES: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "u8": np.dtype(np.uint8),
}


def _allocate(size: int) -> mmap.mmap:
    """Memory of its own, of huge pages where the system has them on request.

    Raises:
        StartError: the system has not so much.
    """
    try:
        memory = mmap.mmap(-1, size)
    except (OSError, OverflowError) as error:
        raise StartError(f"the KV cache does not fit into memory ({size >> 20} MiB); ask for less") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel built without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


class PagedCache:
    """Blocks of keys and values, [block, kv head, slot, head dim] for each layer and kind, one behind the other.

    The memory is not written when it is made, so it is taken as blocks are first used: in pages of 2 MiB where the system gives
    them. Blocks that nothing has used yet are what a prompt takes while the prefix cache keeps all others; a
    prefill of 512 tokens would first touch some 14,000 pages of 4 KiB.

    Attributes:
        tensors: by the name of the graph's input.
        kv: how large it is and what it holds.
        scratch: a block behind those, of which nobody knows but who computes.
    """

    def __init__(self, compiled: ov.CompiledModel, blocks: int) -> None:
        types = {port.any_name: port.element_type.to_string() for port in compiled.inputs}
        shapes = {port.any_name: port.partial_shape for port in compiled.inputs}
        names = [f"{kind}.{layer}" for layer in range(sum(name.startswith("key.") for name in types)) for kind in ("key", "value")]
        shape = [dimension.get_length() for dimension in list(shapes[names[0]])[1:]]
        held = _TYPES[types[names[0]]]
        self.kv = _describe(blocks, len(names) // 2, shape, types[names[0]])
        self.scratch, blocks = blocks, blocks + 1
        self._raw = np.frombuffer(_allocate(blocks * self.kv.bytes_per_block), np.uint8).reshape(len(names), blocks, -1)
        arrays = self._raw.view(held).reshape(len(names), blocks, *shape)
        self.tensors = {name: shared_tensor(array) for name, array in zip(names, arrays, strict=True)}
        self._rounded = self.kv.dtype == "u8"
        self._tokens = arrays.swapaxes(2, 3)

    def read(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """Copy `tokens` out, which are positions in a sequence whose blocks these are; in float32 where the cache is rounded.

        Raises:
            ValueError: they are not consecutive positions within the blocks, or a block is none of the cache's.
        """
        check_transfer(self.kv, blocks, tokens)
        data = self._unrounded(blocks, tokens) if self._rounded else read_tokens(self._tokens, blocks, tokens)
        return KvChunk(tokens, data.reshape(self.kv.canonical_shape(len(tokens))))

    def write(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Copy a chunk in, converted to this cache's type.

        Raises:
            ValueError: its positions are not within the blocks, a block is none of the cache's, or its shape or type is not of
                this model.
        """
        check_transfer(self.kv, blocks, chunk.tokens)
        check_chunk(self.kv, chunk)
        planes = chunk.data.reshape(len(self._raw), *chunk.data.shape[2:])
        if self._rounded:
            for part, block, slots, which in self._parts(blocks, chunk.tokens):
                round_to(self._tokens[part, block, slots], planes[part, which])
        else:
            write_tokens(self._tokens, blocks, chunk.tokens, converted(planes, self._tokens.dtype))

    def read_blocks(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """Copy whole blocks out as they lie: [block, bytes].

        Raises:
            ValueError: a block is none of the cache's.
        """
        return read_blocks(self._raw, self.kv, blocks)

    def write_blocks(self, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Copy whole blocks in.

        Raises:
            ValueError: a block is none of the cache's, or the bytes are not so many.
        """
        write_blocks(self._raw, self.kv, blocks, data)

    def _unrounded(self, blocks: Sequence[int], tokens: range) -> NDArray[np.float32]:
        planes, _, _, heads, width = self._tokens.shape
        data = np.empty((planes, len(tokens), heads, width - HEADER), np.float32)
        for part, block, slots, which in self._parts(blocks, tokens):
            unround(self._tokens[part, block, slots], data[part, which])
        return data

    def _parts(self, blocks: Sequence[int], tokens: range) -> Iterator[tuple[slice, int, slice, slice]]:
        """As `pieces`, of few planes at once: a conversion goes over them several times, in the processor's caches."""
        planes, _, size, heads, width = self._tokens.shape
        some = max(1, _PART // (size * heads * width))
        for piece in pieces(blocks, tokens, size):
            for start in range(0, planes, some):
                yield slice(start, start + some), *piece


def _describe(blocks: int, layers: int, shape: Sequence[int], dtype: str) -> KvSpec:
    heads, _, width = shape
    held, rounded = _TYPES[dtype], dtype == "u8"
    kv = KvSpec(
        block_size=BLOCK_SIZE,
        blocks=blocks,
        bytes_per_block=layers * 2 * math.prod(shape) * held.itemsize,
        layout=LAYOUT,
        dtype=dtype,
        token_shape=(layers, heads, width - HEADER if rounded else width),
        # What 8 bits stand for, a difference times a scale, is in general no number of 16 bits.
        canonical_dtype="float32" if rounded else held.name,
    )
    return replace(kv, native_layout=native_layout("layer.kv.head.token.dim", kv, FORM if rounded else held.name))
