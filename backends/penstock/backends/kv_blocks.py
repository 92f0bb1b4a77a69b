"""Where the tokens of a sequence lie in a paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import CANONICAL_DTYPES, KvChunk, KvSpec

__all__ = ["check_chunk", "slots_of", "transfer_slots"]


def slots_of(blocks: NDArray[np.int32] | Sequence[int], positions: NDArray[np.int64], block_size: int) -> NDArray[np.int64]:
    """Rows of the cache, counted in tokens, that hold these positions of a sequence whose blocks these are."""
    return np.asarray(blocks, np.int64)[positions // block_size] * block_size + positions % block_size


def transfer_slots(kv: KvSpec, blocks: Sequence[int], tokens: range) -> NDArray[np.int64]:
    """As `slots_of`, for blocks and positions that a peer named and nobody has checked yet.

    Raises:
        ValueError: the positions are not consecutive or not within the blocks, or a block is not of this cache.
    """
    if tokens.step != 1 or not 0 <= tokens.start <= tokens.stop <= len(blocks) * kv.block_size:
        raise ValueError(f"{tokens} does not lie within {len(blocks)} blocks of {kv.block_size} tokens")
    if any(not 0 <= block < kv.blocks for block in blocks):
        raise ValueError(f"block ids go from 0 to {kv.blocks - 1}")
    return slots_of(blocks, np.arange(tokens.start, tokens.stop), kv.block_size)


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
