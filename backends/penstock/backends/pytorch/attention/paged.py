"""Attention by the project's own Triton kernels: blocks are read where they lie, and nothing is copied together first."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from penstock.backends.pytorch.attention.paged_kernel import attend_part, join_parts
from penstock.backends.pytorch.attention.plan import PrefillLayout

__all__ = ["Paged", "PagedDecoding", "PagedPrefilling"]

# Rows of a tile: at least as many as the devices' products of matrices take, and more where a prompt has them.
_FEWEST_ROWS, _PREFILL_ROWS = 16, 64
# Tokens that are read at a time: of four bytes fewer, since they have to fit beside one another into a processor's own memory.
_STEP = {2: 64, 4: 32}
# A part reads so many tokens at least, and there are so many parts at most.
_PART_TOKENS, _MOST_PARTS = 256, 32
# Programs for each of the device's processors, below which a past is cut into parts.
_PROGRAMS = 2


@dataclass(frozen=True, slots=True)
class Paged:
    """Makes the attention of steps.

    Attributes:
        window: how many tokens each sees, itself among them; None: all before it.
        processors: of the device; a past is cut into parts until each has something to do.
    """

    window: int | None
    processors: int

    @classmethod
    def on(cls, device: torch.device, window: int | None) -> Paged:
        """For a CUDA or ROCm device."""
        return cls(window, torch.cuda.get_device_properties(device).multi_processor_count)

    def decoding(self, rows: Tensor | None, table: Tensor, bounds: Tensor) -> PagedDecoding:
        """As `MakeDecoding`."""
        return PagedDecoding(rows, table, bounds[:, 1], self)

    def prefilling(self, layout: PrefillLayout, device: torch.device) -> PagedPrefilling:
        """As `MakePrefilling`."""
        table = torch.from_numpy(layout.blocks.astype(np.int64)).to(device)[None]
        last = torch.tensor([layout.past - layout.first], dtype=torch.int64, device=device)
        return PagedPrefilling(layout.rows, table, last, self)

    def attend(self, queries: Tensor, cache: Tensor, table: Tensor, last_seen: Tensor) -> Tensor:
        """[sequences, tokens, heads, dim] from the same and a layer's cache; table and tokens seen as `attend_part` has them."""
        sequences, tokens, heads, dim = queries.shape
        keys, values = cache
        _, block, kv_heads, _ = keys.shape
        group = heads // kv_heads
        group_rows, columns = _power_of_two(group), max(16, _power_of_two(dim))
        rows = max(_FEWEST_ROWS if tokens == 1 else _PREFILL_ROWS, group_rows)
        tiles, step = -(-tokens // (rows // group_rows)), _STEP[keys.element_size()]
        span = table.shape[1] * block
        parts = self.parts(sequences * kv_heads * tiles, span)
        whole = parts == 1
        found = queries.new_empty((*queries.shape[:3], parts, dim), dtype=queries.dtype if whole else torch.float32)
        sums, maxima = (found if whole else found.new_empty(found.shape[:-1]) for _ in range(2))
        attend_part[tiles, kv_heads, sequences * parts](
            *(queries, keys, values, table, last_seen, found, sums, maxima),
            *(tokens, parts, -(-span // (parts * step)) * step, math.log2(math.e) / math.sqrt(dim)),
            *(*queries.stride()[:3], *keys.stride()[:3], table.stride(0), last_seen.stride(0)),
            GROUP=group,
            GROUP_ROWS=group_rows,
            ROWS=rows,
            STEP=step,
            DIM=dim,
            DIM_COLUMNS=columns,
            BLOCK=block,
            WINDOW=self.window or 0,
            WHOLE=whole,
        )
        if whole:
            return found[:, :, :, 0]
        out = queries.new_empty(queries.shape)
        join_parts[(sequences * tokens * heads,)](
            *(found, sums, maxima, out, parts), DIM=dim, DIM_COLUMNS=columns, PART_ROWS=_MOST_PARTS
        )
        return out

    def parts(self, programs: int, span: int) -> int:
        """In how many parts `span` tokens are read where there are so many programs without: a power of two."""
        wanted = min(_MOST_PARTS, _PROGRAMS * self.processors // programs, -(-span // _PART_TOKENS))
        return 1 << max(0, wanted.bit_length() - 1)


@dataclass(frozen=True, slots=True)
class PagedDecoding:
    """A `Decoding`. `last_seen`: [G], the token that each sees last, counted from the first block's beginning."""

    rows: Tensor | None
    table: Tensor
    last_seen: Tensor
    by: Paged

    def attend(self, queries: Tensor, cache: Tensor) -> Tensor:
        """As `Decoding`."""
        return self.by.attend(queries[:, None], cache, self.table, self.last_seen)[:, 0]


@dataclass(frozen=True, slots=True)
class PagedPrefilling:
    """A `Prefilling`: table [1, W], and in `last_seen` [1] the token that the first new one sees last."""

    rows: slice
    table: Tensor
    last_seen: Tensor
    by: Paged

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, cache: Tensor) -> Tensor:  # noqa: ARG002  they stand in the cache
        """As `Prefilling`."""
        return self.by.attend(queries[None], cache, self.table, self.last_seen)[0]


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
