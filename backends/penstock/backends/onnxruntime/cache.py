"""The KV cache: lanes in host memory that this backend owns and the graph reads and writes in place."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import KvChunk, KvSpec
from penstock.backends.kv_blocks import check_chunk, transfer_slots
from penstock.backends.onnxruntime.lanes import Lanes
from penstock.common.service import StartError

__all__ = ["BLOCK_SIZE", "LAYOUT", "LaneCache", "bytes_per_block"]

BLOCK_SIZE = 32
LAYOUT = "lane.head.position.dim"

_TYPE = np.dtype(np.float32)
# In Python from 3.13 on; the number is Linux' on every processor but Alpha, MIPS, PowerPC and SPARC, of which none is served.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def bytes_per_block(decoder: DecoderSpec) -> int:
    """Bytes of a block's keys and values in all layers."""
    return decoder.layers * 2 * BLOCK_SIZE * decoder.kv_heads * decoder.head_dim * _TYPE.itemsize


class LaneCache:
    """For each layer, keys and values [lane, kv head, position, head dim].

    Args:
        decoder: the model.
        blocks: how many blocks of tokens may be held.
        lanes: how many sequences may be held.
        context: tokens that one sequence may hold.

    Raises:
        StartError: the system grants not so much address space.
    """

    def __init__(self, decoder: DecoderSpec, blocks: int, lanes: int, context: int) -> None:
        row = decoder.kv_heads * decoder.head_dim * _TYPE.itemsize
        step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, row)  # so that a lane ends where a page does
        self.capacity = -(-context // step) * step
        self.shape = (decoder.kv_heads, self.capacity, decoder.head_dim)
        self.lane_bytes = row * self.capacity
        names = [f"{kind}.{layer}" for layer in range(decoder.layers) for kind in ("key", "value")]
        self._memory = {name: _reserve(lanes * self.lane_bytes) for name in names}
        self.arrays = {name: np.frombuffer(m, _TYPE).reshape(lanes, *self.shape) for name, m in self._memory.items()}
        self.kv = KvSpec(
            BLOCK_SIZE, blocks, bytes_per_block(decoder), LAYOUT, "f32", (decoder.layers, decoder.kv_heads, decoder.head_dim)
        )
        self.lanes = Lanes(lanes, blocks, empty=self._empty, move=self._move, swap=self._swap)

    def read(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """Copy `tokens` out, which are positions in a sequence whose blocks these are.

        Raises:
            ValueError: they are not consecutive positions within the blocks, or a block is none of the cache's.
        """
        transfer_slots(self.kv, blocks, tokens)
        heads, _, dim = self.shape
        data = np.zeros((len(self.arrays) // 2, 2, len(tokens), heads, dim), _TYPE)
        lane = self.lanes.find(blocks) if tokens else None
        if lane is not None:
            for i, array in enumerate(self.arrays.values()):
                data[i // 2, i % 2] = array[lane, :, tokens.start : tokens.stop].swapaxes(0, 1)
        return KvChunk(tokens, data)

    def write(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Copy a chunk in, converted to this cache's type.

        Raises:
            ValueError: its positions are not within the blocks, a block is none of the cache's, or its shape is not this model's.
        """
        transfer_slots(self.kv, blocks, chunk.tokens)
        check_chunk(self.kv, chunk)
        if not chunk.tokens:
            return
        lane = self.lanes.receive(blocks, chunk.tokens)
        for i, array in enumerate(self.arrays.values()):
            array[lane, :, chunk.tokens.start : chunk.tokens.stop] = chunk.data[i // 2, i % 2].swapaxes(0, 1)

    def _empty(self, lane: int) -> None:
        for memory in self._memory.values():
            memory.madvise(mmap.MADV_DONTNEED, lane * self.lane_bytes, self.lane_bytes)

    def _move(self, source: int, target: int, tokens: int) -> None:
        for array in self.arrays.values():
            array[target, :, :tokens] = array[source, :, :tokens]
        self._empty(source)

    def _swap(self, one: int, other: int, tokens: int) -> None:
        for array in self.arrays.values():
            held = array[one, :, :tokens].copy()
            array[one, :, :tokens] = array[other, :, :tokens]
            array[other, :, :tokens] = held


def _reserve(size: int) -> mmap.mmap:
    """Address space whose pages are taken when they are first written to, and small ones: a lane is used in part."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except (OSError, OverflowError, ValueError) as error:
        raise StartError(f"no {size >> 20} MiB of address space for a layer's KV; lower max_context or max_batch_size") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        _advise(memory)
    return memory


def _advise(memory: Any) -> None:
    try:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError:  # a kernel built without huge pages
        return
