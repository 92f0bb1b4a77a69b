"""Where the tokens of a sequence lie in a paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import CANONICAL_DTYPES, KvChunk, KvSpec

__all__ = ["check_blocks", "check_chunk", "check_copy", "check_native", "check_transfer", "slots_of", "transfer_slots"]


def slots_of(blocks: NDArray[np.int32] | Sequence[int], positions: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    """Rows of the cache, counted in tokens, that hold these positions of a sequence whose blocks these are."""
    return np.asarray(blocks, np.int64)[positions // block_size] * block_size + positions % block_size


def transfer_slots(kv: KvSpec, blocks: Sequence[int], tokens: range) -> NDArray[np.int64]:
    """As `slots_of`, for blocks and positions that a peer named and nobody has checked yet.

    Raises:
        ValueError: as `check_transfer`.
    """
    check_transfer(kv, blocks, tokens)
    return slots_of(blocks, np.arange(tokens.start, tokens.stop), kv.block_size)


def check_transfer(kv: KvSpec, blocks: Sequence[int], tokens: range) -> None:
    """Take positions of a sequence in these blocks.

    Raises:
        ValueError: the positions are not consecutive or not within the blocks, or a block is not of this cache.
    """
    if tokens.step != 1 or not 0 <= tokens.start <= tokens.stop <= len(blocks) * kv.block_size:
        raise ValueError(f"{tokens} does not lie within {len(blocks)} blocks of {kv.block_size} tokens")
    check_blocks(kv, blocks)


def check_blocks(kv: KvSpec, blocks: Sequence[int]) -> None:
    """Take ids of a cache's blocks.

    Raises:
        ValueError: a block is not of this cache.
    """
    if any(not 0 <= block < kv.blocks for block in blocks):
        raise ValueError(f"block ids go from 0 to {kv.blocks - 1}")


def check_copy(kv: KvSpec, source: Sequence[int], target: Sequence[int]) -> None:
    """Take blocks that a prefix is copied from and into.

    Raises:
        ValueError: a block is not of this cache or on both sides, or they are not as many.
    """
    check_blocks(kv, (*source, *target))
    if len(source) != len(target) or not set(source).isdisjoint(target):
        raise ValueError(f"{len(source)} blocks can not be copied into {len(target)}, which must be as many others")


def check_native(kv: KvSpec, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
    """Take blocks in a cache's native form.

    Raises:
        ValueError: a block is not of this cache, or the bytes are not so many.
    """
    check_blocks(kv, blocks)
    expected = len(blocks), kv.bytes_per_block
    if data.shape != expected or data.dtype != np.uint8:
        raise ValueError(f"blocks of {data.dtype} {data.shape} do not fit: uint8 {expected}")


def check_chunk(kv: KvSpec, chunk: KvChunk) -> None:
    """Take KV that a cache can be given.

    Raises:
        ValueError: it is not of this model's shape, or of a type that does not travel.
    """
    expected = kv.canonical_shape(len(chunk.tokens))
    if chunk.data.shape != expected:
        raise ValueError(f"a chunk of shape {chunk.data.shape} does not fit: {expected}")
    if chunk.data.dtype not in CANONICAL_DTYPES.values():
        raise ValueError(f"a chunk of {chunk.data.dtype} is none of {', '.join(CANONICAL_DTYPES)}")
