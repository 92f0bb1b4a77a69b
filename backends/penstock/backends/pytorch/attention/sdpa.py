"""Attention by PyTorch's `scaled_dot_product_attention`, over blocks that are copied together first.

Which kernel of the library that comes to depends on the device, on the mask and on whether KV heads are repeated: of the library's
fast kernels, some take no mask, and some no KV heads that are shared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from penstock.backends.pytorch.attention.plan import PrefillLayout

__all__ = ["GatheredDecoding", "SdpaPrefilling"]


@dataclass(frozen=True, slots=True)
class GatheredDecoding:
    """A `Decoding`: blocks are copied together, padded to the longest sequence, and padding is masked.

    Attributes: as `MakeDecoding` says.
    """

    rows: Tensor | None
    table: Tensor
    bounds: Tensor

    def attend(self, queries: Tensor, cache: Tensor) -> Tensor:
        """As `Decoding`. Queries that share a KV head stand as rows of that head, so that nothing is repeated."""
        sequences, heads, dim = queries.shape
        keys, values = (_gathered(cache[kind], self.table, queries.dtype) for kind in (0, 1))
        tokens = torch.arange(keys.shape[2], device=queries.device)
        seen = (tokens >= self.bounds[:, :1]) & (tokens <= self.bounds[:, 1:])
        self._clear(keys, values, ~seen)
        grouped = queries.reshape(sequences, keys.shape[1], -1, dim)
        return functional.scaled_dot_product_attention(grouped, keys, values, seen[:, None, None]).reshape(sequences, heads, dim)

    def _clear(self, keys: Tensor, values: Tensor, hidden: Tensor) -> None:
        """Write zeros behind each sequence's end: blocks may hold NaN of a last owner, which no mask hides, for 0 · NaN is NaN."""
        # Who asks a device where that begins waits for all that it has to do, and can not be part of a graph.
        first = int(self.bounds[:, 1].min()) + 1 if keys.device.type == "cpu" else 0
        for each in (keys, values):
            each[:, :, first:].masked_fill_(hidden[:, None, first:, None], 0)


@dataclass(frozen=True, slots=True)
class SdpaPrefilling:
    """A `Prefilling`.

    Attributes:
        rows: where its tokens stand among the step's.
        table: [W], the blocks that it reads; None: it has no past, and reads the new tokens alone.
        read: which of the blocks' tokens, counted from the first block's beginning.
        seen: bool [T, tokens read], or a bias; None: each new token sees those up to itself, and there is no past.
        repeats: whether KV heads are repeated for the heads that share them.
    """

    rows: slice
    table: Tensor | None
    read: slice
    seen: Tensor | None
    repeats: bool = False

    @classmethod
    def masked(cls, layout: PrefillLayout, device: torch.device) -> SdpaPrefilling:
        """What a token does not see is masked."""
        causal = not (layout.past or layout.hides)
        return cls._of(layout, None if causal else _mask(layout, device), device)

    @classmethod
    def repeated(cls, layout: PrefillLayout, device: torch.device) -> SdpaPrefilling:
        """The same with KV heads repeated."""
        return replace(cls.masked(layout, device), repeats=True)

    @classmethod
    def lower_right(cls, layout: PrefillLayout, device: torch.device) -> SdpaPrefilling:
        """The library is told that the new tokens are the last ones; there is a mask only where a window hides something."""
        if layout.hides or not layout.past:
            return cls.masked(layout, device)
        bias = causal_lower_right(layout.end - layout.past, layout.end - layout.oldest)
        return cls._of(layout, bias, device)

    @classmethod
    def _of(cls, layout: PrefillLayout, seen: Tensor | None, device: torch.device) -> SdpaPrefilling:
        table = torch.from_numpy(layout.blocks.astype(np.int64)).to(device) if layout.past else None
        return cls(layout.rows, table, slice(layout.oldest - layout.first, layout.end - layout.first), seen)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, cache: Tensor) -> Tensor:
        """As `Prefilling`."""
        if self.table is None:
            keys, values = (new[self.rows].transpose(0, 1)[None].to(queries.dtype) for new in (keys, values))
            if queries.device.type == "cpu":  # where each tile of queries reads a head's rows quicker that lie in a row
                keys, values = keys.contiguous(), values.contiguous()
        else:
            keys, values = (_gathered(cache[kind], self.table[None], queries.dtype)[:, :, self.read] for kind in (0, 1))
        if self.repeats:
            keys, values = (each.repeat_interleave(queries.shape[1] // each.shape[1], 1) for each in (keys, values))
        attended = functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None], keys, values, self.seen, is_causal=self.seen is None, enable_gqa=not self.repeats
        )
        return attended[0].transpose(0, 1)


def _gathered(cache: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """[G, kv heads, W · block size, dim] of one kind's [blocks, block size, kv heads, dim].

    Whole blocks are copied: a row of a block is some hundred bytes, and gathering rows costs several times as much.
    """
    chosen = cache.index_select(0, table.flatten())
    return chosen.view(table.shape[0], -1, *cache.shape[2:]).to(dtype).transpose(1, 2)


def _mask(layout: PrefillLayout, device: torch.device) -> Tensor:
    return _seen(range(layout.past, layout.end), range(layout.oldest, layout.end), layout.window, device)


def _seen(own: Iterable[int], others: Iterable[int], window: int | None, device: torch.device) -> Tensor:
    queries, keys = np.fromiter(own, np.int64)[:, None], np.fromiter(others, np.int64)[None]
    allowed = keys <= queries
    if window is not None:
        allowed &= keys > queries - window
    return torch.from_numpy(allowed).to(device)
