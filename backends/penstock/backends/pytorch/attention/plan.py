"""A step's attention, and the port behind which each way of computing it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Attention", "AttentionPlan", "Decoding", "MakeDecoding", "MakePrefilling", "PrefillLayout", "Prefilling", "oldest_seen"]


class Decoding(Protocol):
    """Attention of sequences with one new token each."""

    @property
    def rows(self) -> Tensor | None:
        """[G], where their tokens stand among the step's; None: they are all of the step, in order."""

    def attend(self, queries: Tensor, cache: Tensor) -> Tensor:
        """[G, heads, dim] from the same and a layer's cache, in which the new tokens' KV stands already."""


class Prefilling(Protocol):
    """Attention of one sequence with several new tokens."""

    @property
    def rows(self) -> slice:
        """Where its tokens stand among the step's."""

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, cache: Tensor) -> Tensor:
        """[T, heads, dim] from the same, the whole step's [tokens, kv heads, dim] in the cache's type, and a layer's cache."""


@dataclass(frozen=True, slots=True)
class PrefillLayout:
    """One sequence with several new tokens, as it stands in the cache.

    Attributes:
        rows: where its tokens stand among the step's.
        past: how many tokens stand before them.
        blocks: [W], the blocks that it reads, those of the new tokens included.
        first: the position at which the first of these blocks begins.
        window: how many tokens each sees, itself among them; None: all before it.
    """

    rows: slice
    past: int
    blocks: NDArray[np.int32]
    first: int
    window: int | None

    @property
    def end(self) -> int:
        """The position behind its last token."""
        return self.past + int(self.rows.stop - self.rows.start)

    @property
    def oldest(self) -> int:
        """The oldest position that any of its new tokens sees."""
        return oldest_seen(self.past, self.window)

    @property
    def hides(self) -> bool:
        """Whether the window keeps a new token from one before it."""
        return self.window is not None and self.end > self.window


def oldest_seen(past: int, window: int | None) -> int:
    """The oldest position that a token behind `past` others sees, or the first of several."""
    return 0 if window is None else max(0, past - window + 1)


MakeDecoding = Callable[[Tensor | None, Tensor, Tensor], Decoding]
"""From rows as `Decoding` has them; table [G, W], the blocks that each reads, padding naming any block; and bounds [G, 2], the
first and the last of the W blocks' tokens that each sees, counted from the first block's beginning. Nothing is read of them before
`attend`, since recorded steps write to them."""

MakePrefilling = Callable[[PrefillLayout, torch.device], Prefilling]


@dataclass(frozen=True, slots=True)
class Attention:
    """How a model attends: a way for decoding and one for prefill, and their names."""

    decoding: MakeDecoding
    prefilling: MakePrefilling
    names: tuple[str, str]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's attention, the same for every layer. `written`: [T], slots of the cache that the new tokens' KV goes to."""

    written: Tensor
    prefills: tuple[Prefilling, ...]
    decodes: tuple[Decoding, ...]

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
