"""Attention over a paged cache: which blocks each sequence reads, padded where sequences go together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["AttentionPlan", "DecodeGroup", "Prefill"]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of one new token each, padded to the longest of them.

    Attributes:
        rows: [G], where their tokens stand among the step's; None: they are all of the step, in order.
        table: [G, W], the blocks that each reads; padding names any block.
        bounds: [G, 2], the first and the last of the W blocks' tokens that each sees, counted from the first block's beginning.
    """

    rows: Tensor | None
    table: Tensor
    bounds: Tensor

    def attend(self, queries: Tensor, cache: Tensor) -> Tensor:
        """[G, heads, dim] from the same. Queries that share a KV head stand as rows of that head, so that nothing is repeated."""
        sequences, heads, dim = queries.shape
        keys, values = (_gathered(cache[kind], self.table, queries.dtype) for kind in (0, 1))
        tokens = torch.arange(keys.shape[2], device=queries.device)
        seen = ((tokens >= self.bounds[:, :1]) & (tokens <= self.bounds[:, 1:]))[:, None, None]
        grouped = queries.reshape(sequences, keys.shape[1], -1, dim)
        return functional.scaled_dot_product_attention(grouped, keys, values, seen).reshape(sequences, heads, dim)


@dataclass(frozen=True, slots=True)
class Prefill:
    """One sequence with several new tokens.

    Attributes:
        rows: where its tokens stand among the step's.
        table: [W], the blocks that it reads; None: it has no past, and reads the new tokens alone.
        read: which of the blocks' tokens, counted from the first block's beginning.
        seen: bool [T, tokens read]; None: each new token sees those up to itself.
    """

    rows: slice
    table: Tensor | None
    read: slice
    seen: Tensor | None

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, cache: Tensor) -> Tensor:
        """[T, heads, dim] from [T, heads, dim] and the new tokens' [T, kv heads, dim] in the cache's type."""
        if self.table is None:
            keys, values = (new[self.rows].transpose(0, 1)[None].to(queries.dtype) for new in (keys, values))
        else:
            keys, values = (_gathered(cache[kind], self.table[None], queries.dtype)[:, :, self.read] for kind in (0, 1))
        attended = functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None], keys, values, self.seen, is_causal=self.seen is None, enable_gqa=True
        )
        return attended[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's attention, the same for every layer. `written`: [T], slots of the cache that the new tokens' KV goes to."""

    written: Tensor
    prefills: tuple[Prefill, ...]
    decodes: tuple[DecodeGroup, ...]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, cache: Tensor) -> Tensor:
        """Write the new tokens' KV into a layer's cache, then attend.

        Args:
            queries: [T, heads, dim].
            keys: [T, kv heads, dim].
            values: [T, kv heads, dim].
            cache: [2 (key, value), blocks, block size, kv heads, dim].

        Returns:
            [T, heads, dim].
        """
        keys, values = keys.to(cache.dtype), values.to(cache.dtype)
        for kind, new in enumerate((keys, values)):
            cache[kind].flatten(0, 1).index_copy_(0, self.written, new)
        if not self.prefills and self.decodes[0].rows is None:
            return self.decodes[0].attend(queries, cache)
        out = torch.empty_like(queries)
        for prefill in self.prefills:
            out[prefill.rows] = prefill.attend(queries[prefill.rows], keys, values, cache)
        for group in self.decodes:
            out[group.rows] = group.attend(queries[group.rows], cache)
        return out


def _gathered(cache: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, kv heads, W · block size, dim] of one kind's [blocks, block size, kv heads, dim].

    Whole blocks are copied: a row of a block is some hundred bytes, and gathering rows costs several times as much.
    """
    chosen = cache.index_select(0, table.flatten())
    return chosen.view(table.shape[0], -1, *cache.shape[2:]).to(dtype).transpose(1, 2)
