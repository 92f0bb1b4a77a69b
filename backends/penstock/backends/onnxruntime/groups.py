"""A step's sequences in groups that the graph takes at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import StepBatch
from penstock.backends.onnxruntime.lanes import Lanes

__all__ = ["Group", "groups"]


@dataclass(frozen=True, slots=True)
class Group:
    """B sequences with T new tokens each, in lanes side by side.

    Attributes:
        first_lane: of the B.
        token_ids: int64 [B, T], in the order of lanes.
        last_positions: int32 [B], of the last new token.
        longest: int32 [1], tokens of the longest sequence then.
        logits_rows: int64 [R], indices into B · T.
        outputs: int64 [R], where each row stands among those that the step is asked for; rising.
    """

    first_lane: int
    token_ids: NDArray[np.int64]
    last_positions: NDArray[np.int32]
    longest: NDArray[np.int32]
    logits_rows: NDArray[np.int64]
    outputs: NDArray[np.int64]


def groups(batch: StepBatch, lanes: Lanes) -> Iterator[Group]:
    """The groups of a step. Sequences with one new token go together, and so do whole prompts of one length.

    A group is made when the one before it has been computed: that it lies side by side may move the others.

    Raises:
        RuntimeError: the past of a sequence is not in the cache.
    """
    counts = np.diff(batch.starts)
    together: dict[tuple[int, int], list[int]] = {}
    for sequence, (count, past) in enumerate(zip(counts.tolist(), batch.past_lengths.tolist(), strict=True)):
        alone = sequence if count > 1 and past else -1
        together.setdefault((count, alone), []).append(sequence)
    for (count, _), members in together.items():
        yield _group(batch, lanes, members, count)


def _group(batch: StepBatch, lanes: Lanes, members: list[int], count: int) -> Group:
    sequences = np.array(members)
    past = batch.past_lengths[sequences]
    bounds = zip(batch.block_starts[sequences].tolist(), batch.block_starts[sequences + 1].tolist(), past.tolist(), strict=True)
    held = [lanes.step(batch.block_ids[begin:end], before, before + count) for begin, end, before in bounds]
    if len(held) > 1:
        held = lanes.gather(held)
    order = np.argsort(held)
    sequences, past = sequences[order], past[order]
    token_rows = batch.starts[sequences][:, None] + np.arange(count)
    rows, outputs = _wanted(batch, token_rows)
    return Group(
        first_lane=min(held),
        token_ids=batch.token_ids[token_rows],
        last_positions=(past + (count - 1)).astype(np.int32),
        longest=np.array([past.max() + count], np.int32),
        logits_rows=rows,
        outputs=outputs,
    )


def _wanted(batch: StepBatch, token_rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of a group's tokens logits are wanted for, and where those stand among the step's."""
    place = np.full(int(batch.starts[-1]), -1, np.int64)
    place[token_rows.ravel()] = np.arange(token_rows.size)
    places = place[batch.logits_rows]
    outputs = np.flatnonzero(places >= 0)
    return places[outputs], outputs
