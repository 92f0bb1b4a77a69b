"""Copies of KV between a paged cache in host memory and what goes to another model, a call of numpy for each block.

A cache is seen as planes, the keys and the values of each layer in turn, whose blocks lie anywhere. Values are copied as the bits
that they are: numpy copies its own types in whole runs, and those of other packages one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import KvSpec
from penstock.backends.kv_blocks import check_blocks, check_native

__all__ = ["as_bits", "converted", "native_layout", "pieces", "read_blocks", "read_tokens", "write_blocks", "write_tokens"]


def native_layout(order: str, kv: KvSpec, values: str) -> str:
    """The name of a native form: two caches have the same one if, and only if, their blocks are the same bytes for the same KV.

    Args:
        order: of a block's bytes, with the version of the form where it had others.
        kv: the cache.
        values: how a value is held, with its scales.
    """
    layers, heads, dim = kv.token_shape
    return f"{order};layers={layers};heads={heads};dim={dim};tokens={kv.block_size};{values}"


def as_bits(array: NDArray[Any]) -> NDArray[Any]:
    """The same memory as unsigned numbers of the same size."""
    return array.view(f"u{array.itemsize}")


def converted(values: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Values in a type of `CANONICAL_DTYPES`, rounded to the nearest; themselves where they have it already.

    What float16 can not reach becomes its greatest or least, since infinity would make NaN of a whole answer.
    """
    if dtype == np.float16 and values.dtype != dtype:
        limit = np.finfo(np.float16)
        values = np.clip(values.astype(np.float32, copy=False), limit.min, limit.max)
    return values.astype(dtype, copy=False)


def pieces(blocks: Sequence[int], tokens: range, block_size: int) -> Iterator[tuple[int, slice, slice]]:
    """The blocks that tokens of a sequence lie in: the id, the slots within it, and which of the tokens these are."""
    for at in range(tokens.start // block_size, -(-tokens.stop // block_size)):
        start, stop = max(tokens.start, at * block_size), min(tokens.stop, (at + 1) * block_size)
        yield blocks[at], slice(start - at * block_size, stop - at * block_size), slice(start - tokens.start, stop - tokens.start)


def read_tokens(cache: NDArray[Any], blocks: Sequence[int], tokens: range) -> NDArray[Any]:
    """Copy tokens out of a cache [plane, block, slot, …], of any strides: [plane, token, …]."""
    planes, _, block_size, *rest = cache.shape
    data = np.empty((planes, len(tokens), *rest), cache.dtype)
    source, target = as_bits(cache), as_bits(data)
    for block, slots, which in pieces(blocks, tokens, block_size):
        target[:, which] = source[:, block, slots]
    return data


def write_tokens(cache: NDArray[Any], blocks: Sequence[int], tokens: range, data: NDArray[Any]) -> None:
    """Copy tokens [plane, token, …] of the cache's type into it."""
    source, target = as_bits(data), as_bits(cache)
    for block, slots, which in pieces(blocks, tokens, cache.shape[2]):
        target[:, block, slots] = source[:, which]


def read_blocks(raw: NDArray[np.uint8], kv: KvSpec, blocks: Sequence[int]) -> NDArray[np.uint8]:
    """Copy blocks out of a cache's bytes [plane, block, bytes of a plane]: [block, bytes].

    Raises:
        ValueError: a block is not of this cache.
    """
    check_blocks(kv, blocks)
    data = np.empty((len(blocks), kv.bytes_per_block), np.uint8)
    for row, block in zip(data, blocks, strict=True):
        row.reshape(len(raw), -1)[...] = raw[:, block]
    return data


def write_blocks(raw: NDArray[np.uint8], kv: KvSpec, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
    """Copy blocks as `read_blocks` gives them into a cache's bytes.

    Raises:
        ValueError: a block is not of this cache, or the bytes are not so many; nothing is written then.
    """
    check_native(kv, blocks, data)
    for block, row in zip(blocks, data, strict=True):
        raw[:, block] = row.reshape(len(raw), -1)
