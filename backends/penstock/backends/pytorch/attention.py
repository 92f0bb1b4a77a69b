"""Attention over a paged cache: which rows of the cache each new token is written to, and which its sequence reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from penstock.backends.contract import StepBatch
from penstock.backends.kv_blocks import slots_of

__all__ = ["AttentionPlan", "DecodeGroup", "Prefill", "plan_attention"]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of one new token each, padded to the longest of them.

    Attributes:
        rows: [G], where their tokens stand among the step's.
        slots: [G, L], rows of the cache that each reads; padding reads row 0, unseen.
        seen: bool [G, 1, 1, L].
    """

    rows: Tensor
    slots: Tensor
    seen: Tensor

    def attend(self, queries: Tensor, cache: Tensor) -> Tensor:
        """[G, heads, dim] from the same. Queries that share a KV head stand as rows of that head, so that nothing is repeated."""
        sequences, heads, dim = queries.shape
        keys, values = (cache[kind][self.slots].transpose(1, 2) for kind in (0, 1))
        grouped = queries.view(sequences, keys.shape[1], -1, dim)
        return functional.scaled_dot_product_attention(grouped, keys, values, self.seen).reshape(sequences, heads, dim)


@dataclass(frozen=True, slots=True)
class Prefill:
    """One sequence with several new tokens.

    Attributes:
        rows: [T], where its tokens stand among the step's.
        slots: [L], rows of the cache that it reads.
        seen: bool [T, L]; None: new tokens alone, each seeing those up to itself.
    """

    rows: Tensor
    slots: Tensor
    seen: Tensor | None

    def attend(self, queries: Tensor, cache: Tensor) -> Tensor:
        """[T, heads, dim] from [T, heads, dim]."""
        keys, values = (cache[kind][self.slots].transpose(0, 1)[None] for kind in (0, 1))
        attended = functional.scaled_dot_product_attention(
            queries.transpose(0, 1)[None], keys, values, self.seen, is_causal=self.seen is None, enable_gqa=True
        )
        return attended[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One step's attention, the same for every layer. `written`: [T], rows of the cache that the new tokens' KV goes to."""

    written: Tensor
    parts: tuple[DecodeGroup | Prefill, ...]

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, cache: Tensor) -> Tensor:
        """Write the new tokens' KV into a layer's cache, then attend.

        Args:
            queries: [T, heads, dim].
            keys: [T, kv heads, dim].
            values: [T, kv heads, dim].
            cache: [2 (key, value), slots, kv heads, dim].

        Returns:
            [T, heads, dim].
        """
        cache[0][self.written] = keys
        cache[1][self.written] = values
        out = torch.empty_like(queries)
        for part in self.parts:
            out[part.rows] = part.attend(queries[part.rows], cache)
        return out


def plan_attention(batch: StepBatch, block_size: int, window: int | None, device: torch.device) -> AttentionPlan:
    """Lay a step out. With a `window`, a token sees itself and the `window` - 1 before it, and older ones are not read."""
    written: list[NDArray[np.int64]] = []
    decodes: list[tuple[int, NDArray[np.int64]]] = []
    parts: list[DecodeGroup | Prefill] = []
    for s, past in enumerate(batch.past_lengths.tolist()):
        start, end = int(batch.starts[s]), int(batch.starts[s + 1])
        blocks = batch.block_ids[batch.block_starts[s] : batch.block_starts[s + 1]]
        total = past + end - start
        first = 0 if window is None else max(0, past - window + 1)
        slots = slots_of(blocks, np.arange(first, total), block_size)
        written.append(slots[past - first :])
        if end - start == 1:
            decodes.append((start, slots))
        else:
            parts.append(_prefill(start, past, first, slots, end - start, window, device))
    if decodes:
        parts.append(_decode_group(decodes, device))
    return AttentionPlan(torch.from_numpy(np.concatenate(written)).to(device), tuple(parts))


def _prefill(
    start: int, past: int, first: int, slots: NDArray[np.int64], new: int, window: int | None, device: torch.device
) -> Prefill:
    seen = None
    if past or (window is not None and new > window):
        own = np.arange(past, past + new)[:, None]
        seen_by = np.arange(first, past + new)[None]
        allowed = seen_by <= own
        if window is not None:
            allowed &= seen_by > own - window
        seen = torch.from_numpy(allowed).to(device)
    return Prefill(torch.arange(start, start + new, device=device), torch.from_numpy(slots).to(device), seen)


def _decode_group(decodes: list[tuple[int, NDArray[np.int64]]], device: torch.device) -> DecodeGroup:
    longest = max(len(slots) for _, slots in decodes)
    slots, seen = np.zeros((len(decodes), longest), np.int64), np.zeros((len(decodes), 1, 1, longest), np.bool_)
    for row, (_, own) in enumerate(decodes):
        slots[row, : len(own)] = own
        seen[row, ..., : len(own)] = True
    rows = torch.tensor([start for start, _ in decodes], device=device)
    return DecodeGroup(rows, torch.from_numpy(slots).to(device), torch.from_numpy(seen).to(device))
