"""A step's layout for attention, worked out on the host: slots to write, sequences that go together, padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.backends.contract import StepBatch
from penstock.backends.pytorch.attention.plan import Attention, AttentionPlan, PrefillLayout, oldest_seen

__all__ = ["decode_layout", "group_by_width", "plan_attention", "written_slots"]


def plan_attention(
    batch: StepBatch, block_size: int, window: int | None, device: torch.device, attention: Attention
) -> AttentionPlan:
    """Lay a step out. With a `window`, a token sees itself and the `window` - 1 before it, and older blocks are not read."""
    new = np.diff(batch.starts)
    decoding = np.flatnonzero(new == 1).tolist()
    layouts = [_prefill(batch, s, block_size, window) for s in np.flatnonzero(new > 1).tolist()]
    groups = group_by_width({s: len(_blocks_read(batch, s, block_size, window)[1]) for s in decoding})
    decodes = []
    for group in groups:
        table, bounds = decode_layout(batch, group, block_size, window)
        alone = len(group) == len(new)
        rows = None if alone else torch.from_numpy(batch.starts[group].astype(np.int64)).to(device)
        decodes.append(attention.decoding(rows, torch.from_numpy(table).to(device), torch.from_numpy(bounds).to(device)))
    prefills = tuple(attention.prefilling(layout, device) for layout in layouts)
    return AttentionPlan(torch.from_numpy(written_slots(batch, block_size)).to(device), prefills, tuple(decodes))


def written_slots(batch: StepBatch, block_size: int) -> NDArray[np.int64]:
    """[T], the slot of the cache, counted in tokens, that each new token's KV goes to."""
    sequence = np.repeat(np.arange(len(batch.past_lengths)), np.diff(batch.starts))
    blocks = batch.block_ids[batch.block_starts[sequence] + batch.positions // block_size].astype(np.int64)
    slots: NDArray[np.int64] = blocks * block_size + batch.positions % block_size
    return slots


def group_by_width(widths: Mapping[int, int]) -> list[list[int]]:
    """Sequences by how many blocks they read, so that padding at most doubles what a group reads: widths of (2ⁿ⁻¹, 2ⁿ] together."""
    groups: dict[int, list[int]] = {}
    for sequence, width in widths.items():
        groups.setdefault((width - 1).bit_length(), []).append(sequence)
    return [groups[size] for size in sorted(groups)]


def decode_layout(
    batch: StepBatch, group: Sequence[int], block_size: int, window: int | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`MakeDecoding`'s table [G, W] and bounds [G, 2] for these sequences of a step; padding names block 0."""
    reads = [_blocks_read(batch, s, block_size, window) for s in group]
    table = np.zeros((len(group), max(len(blocks) for _, blocks in reads)), np.int64)
    bounds = np.empty((len(group), 2), np.int64)
    for row, (s, (first, blocks)) in enumerate(zip(group, reads, strict=True)):
        table[row, : len(blocks)] = blocks
        past = int(batch.past_lengths[s])
        bounds[row] = oldest_seen(past, window) - first, past - first
    return table, bounds


def _blocks_read(batch: StepBatch, s: int, block_size: int, window: int | None) -> tuple[int, NDArray[np.int32]]:
    """The position at which the first block that a sequence reads begins, and the blocks."""
    skipped = oldest_seen(int(batch.past_lengths[s]), window) // block_size
    blocks = batch.block_ids[batch.block_starts[s] : batch.block_starts[s + 1]]
    return skipped * block_size, blocks[skipped:]


def _prefill(batch: StepBatch, s: int, block_size: int, window: int | None) -> PrefillLayout:
    first, blocks = _blocks_read(batch, s, block_size, window)
    return PrefillLayout(slice(int(batch.starts[s]), int(batch.starts[s + 1])), int(batch.past_lengths[s]), blocks, first, window)
