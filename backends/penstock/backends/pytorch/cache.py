"""Copies of KV between a paged cache, one tensor on whichever device, and what goes to another model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.backends.contract import KvChunk, KvSpec
from penstock.backends.kv_blocks import check_blocks, check_chunk, check_native, check_transfer, transfer_slots
from penstock.backends.kv_copies import native_layout, read_blocks, read_tokens, write_blocks, write_tokens
from penstock.backends.pytorch.loading import from_numpy, to_numpy

__all__ = ["CacheCopies", "HostCopies", "copies_of", "described"]

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def described(kv: KvSpec, dtype: torch.dtype) -> KvSpec:
    """A cache of this type with the names of what it exports: blocks are [layer, 2 (key, value), token, kv head, head dim]."""
    name = _NAMES[dtype]
    return replace(kv, canonical_dtype=name, native_layout=native_layout("layer.kv.token.head.dim", kv, name))


def copies_of(cache: Tensor, kv: KvSpec) -> CacheCopies:
    """What copies out of a cache [layers, 2 (key, value), at least `kv.blocks`, block size, kv heads, head dim] and into it."""
    return HostCopies(cache, kv) if cache.device.type == "cpu" else CacheCopies(cache, kv)


class CacheCopies:
    """Copies by the device that the cache is on, before and behind the way to the host."""

    def __init__(self, cache: Tensor, kv: KvSpec) -> None:
        self._cache, self._kv = cache, kv

    def read(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """As `GenerativeModel.export_kv`."""
        slots = from_numpy(transfer_slots(self._kv, blocks, tokens)).to(self._cache.device)
        with torch.inference_mode():
            return KvChunk(tokens, to_numpy(self._cache.flatten(2, 3).index_select(2, slots).cpu()))

    def write(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """As `GenerativeModel.import_kv`."""
        check_chunk(self._kv, chunk)
        slots = from_numpy(transfer_slots(self._kv, blocks, chunk.tokens)).to(self._cache.device)
        with torch.inference_mode():
            self._cache.flatten(2, 3).index_copy_(2, slots, self._taken(chunk.data))

    def read_blocks(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """As `NativeKv.export_blocks`."""
        check_blocks(self._kv, blocks)
        with torch.inference_mode():
            chosen = self._cache.index_select(2, self._ids(blocks)).permute(2, 0, 1, 3, 4, 5).contiguous()
            return chosen.cpu().flatten().view(torch.uint8).numpy().reshape(len(blocks), self._kv.bytes_per_block)

    def write_blocks(self, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
        """As `NativeKv.import_blocks`."""
        check_native(self._kv, blocks, data)
        layers, kinds, _, *rest = self._cache.shape
        with torch.inference_mode():
            raw = from_numpy(np.ascontiguousarray(data)).to(self._cache.device).view(self._cache.dtype)
            values = raw.reshape(len(blocks), layers, kinds, *rest).permute(1, 2, 0, 3, 4, 5)
            self._cache.index_copy_(2, self._ids(blocks), values)

    def _ids(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self._cache.device)

    def _taken(self, data: NDArray[Any]) -> Tensor:
        return from_numpy(np.ascontiguousarray(data)).to(device=self._cache.device, dtype=self._cache.dtype)


class HostCopies(CacheCopies):
    """Copies where the cache lies in host memory."""

    def __init__(self, cache: Tensor, kv: KvSpec) -> None:
        super().__init__(cache, kv)
        self._tokens = to_numpy(cache).reshape(-1, *cache.shape[2:])
        self._raw = self._tokens.view(np.uint8).reshape(len(self._tokens), cache.shape[2], -1)

    def read(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """As `GenerativeModel.export_kv`."""
        check_transfer(self._kv, blocks, tokens)
        data = read_tokens(self._tokens, blocks, tokens)
        return KvChunk(tokens, data.reshape(self._kv.canonical_shape(len(tokens))))

    def write(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """As `GenerativeModel.import_kv`."""
        check_transfer(self._kv, blocks, chunk.tokens)
        check_chunk(self._kv, chunk)
        data = chunk.data
        if data.dtype != self._tokens.dtype:
            data = to_numpy(self._taken(data))
        write_tokens(self._tokens, blocks, chunk.tokens, data.reshape(len(self._tokens), *data.shape[2:]))

    def read_blocks(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """As `NativeKv.export_blocks`."""
        return read_blocks(self._raw, self._kv, blocks)

    def write_blocks(self, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
        """As `NativeKv.import_blocks`."""
        write_blocks(self._raw, self._kv, blocks, data)
