"""The KV cache: lanes that this backend owns and the graph reads and writes in place."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import KvChunk, KvSpec
from penstock.backends.kv_blocks import check_chunk, check_copy, transfer_slots
from penstock.backends.onnxruntime.device_memory import DeviceLanes
from penstock.backends.onnxruntime.lanes import Lanes
from penstock.backends.onnxruntime.memory import HostLanes, LaneMemory
from penstock.backends.onnxruntime.providers import Target

__all__ = ["BLOCK_SIZE", "LAYOUT", "LaneCache", "bytes_per_block", "device_cache"]

BLOCK_SIZE = 32
LAYOUT = "lane.head.position.dim"

_FLOAT32 = np.dtype(np.float32)
_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def bytes_per_block(decoder: DecoderSpec, block_size: int = BLOCK_SIZE, dtype: np.dtype[Any] = _FLOAT32) -> int:
    """Bytes of a block's keys and values in all layers."""
    return decoder.layers * 2 * block_size * decoder.kv_heads * decoder.head_dim * dtype.itemsize


def device_cache(decoder: DecoderSpec, lanes: int, context: int, dtype: np.dtype[Any], target: Target) -> LaneCache:
    """A cache in a device's memory, where a block is a lane: a sequence takes as much as the longest one could.

    Memory there does not wait to be written to, so less would save nothing; and a sequence that has a block has a lane.

    Raises:
        StartError: the device has not so much memory.
    """
    shape = decoder.kv_heads, context, decoder.head_dim
    memory = DeviceLanes(_inputs(decoder), lanes, shape, dtype, target)
    return LaneCache(decoder, lanes, lanes, context, memory, block_size=context, dtype=dtype)


class LaneCache:
    """For each layer, keys and values [lane, kv head, position, head dim].

    Args:
        decoder: the model.
        blocks: how many blocks of tokens may be held.
        lanes: how many sequences may be held.
        context: tokens that one sequence may hold.
        memory: where the lanes lie, each of just `context` positions; None: in address space of this process, of a few more.
        block_size: tokens of a block.
        dtype: of an element.

    Raises:
        StartError: the system grants not so much address space.
    """

    def __init__(
        self,
        decoder: DecoderSpec,
        blocks: int,
        lanes: int,
        context: int,
        memory: LaneMemory | None = None,
        *,
        block_size: int = BLOCK_SIZE,
        dtype: np.dtype[Any] = _FLOAT32,
    ) -> None:
        row = decoder.kv_heads * decoder.head_dim * dtype.itemsize
        step = 1 if memory else mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, row)  # so that a lane ends where a page does
        self.capacity = -(-context // step) * step
        self.shape = (decoder.kv_heads, self.capacity, decoder.head_dim)
        self.lane_bytes = row * self.capacity
        self.dtype = dtype
        self.memory = memory or HostLanes(_inputs(decoder), lanes, self.shape)
        size = bytes_per_block(decoder, block_size, dtype)
        tokens = decoder.layers, decoder.kv_heads, decoder.head_dim
        self.kv = KvSpec(
            block_size, blocks, size, LAYOUT, _NAMES[dtype.name], tokens, canonical_dtype=dtype.name, copies_prefixes=True
        )
        self.lanes = Lanes(lanes, blocks, block_size, self.memory)

    def read(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """Copy `tokens` out, which are positions in a sequence whose blocks these are.

        Raises:
            ValueError: they are not consecutive positions within the blocks, or a block is none of the cache's.
            RuntimeError: some of them, or of those before them, are not here.
        """
        transfer_slots(self.kv, blocks, tokens)
        data = np.empty(self.kv.canonical_shape(len(tokens)), self.dtype)
        if tokens:
            lane = self.lanes.find(blocks, tokens.stop)
            for i, name in enumerate(self.memory.addresses):
                data[i // 2, i % 2] = self.memory.read(name, lane, tokens).swapaxes(0, 1)
        return KvChunk(tokens, data)

    def write(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Copy a chunk in, converted to this cache's type.

        Raises:
            ValueError: its positions are not within the blocks, a block is none of the cache's, or its shape is not this model's.
            RuntimeError: what stands before it is not here.
        """
        transfer_slots(self.kv, blocks, chunk.tokens)
        check_chunk(self.kv, chunk)
        if not chunk.tokens:
            return
        lane = self.lanes.receive(blocks, chunk.tokens)
        for i, name in enumerate(self.memory.addresses):
            self.memory.write(name, lane, chunk.tokens, chunk.data[i // 2, i % 2].swapaxes(0, 1))

    def copy_prefix(self, source: Sequence[int], target: Sequence[int]) -> int:
        """Copy whole blocks into the first of a new sequence; how many were there to be copied.

        Raises:
            ValueError: a block is not of this cache or on both sides, or they are not as many.
        """
        check_copy(self.kv, source, target)
        return self.lanes.copy(source, target) if source else 0


def _inputs(decoder: DecoderSpec) -> list[str]:
    """Names of the graph's inputs, each layer's keys before its values."""
    return [f"{kind}.{layer}" for layer in range(decoder.layers) for kind in ("key", "value")]
