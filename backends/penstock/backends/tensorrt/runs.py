"""How a step is cut into runs of the graph: its decodes together, as many as a profile admits, and each prefill in parts.

A part of a prefill reads what the part before it wrote, so runs are in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import StepBatch
from penstock.backends.kv_blocks import slots_of
from penstock.backends.tensorrt.graph import UNSEEN
from penstock.backends.tensorrt.profiles import PAST_STEP, Profile, choose

__all__ = ["Run", "plan_runs"]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the graph.

    Attributes:
        profile: which one it is within.
        inputs: the graph's int32 inputs, by name.
        written: int64 [B · L], rows of the cache that the keys and values of the new tokens go to.
        rows: int64 [R], where its logits stand among those that the step was asked for; may be empty, and then one row is computed
            that nobody asked for, since the graph computes at least one.
    """

    profile: int
    inputs: dict[str, NDArray[np.int32]]
    written: NDArray[np.int64]
    rows: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Piece:
    """New tokens of one sequence: which of the step's, and the slots of everything that it sees, its own among them."""

    start: int
    end: int
    first: int
    past: int
    slots: NDArray[np.int64]

    @property
    def reach(self) -> int:
        """Tokens of the past that it reads."""
        return self.past - self.first


def plan_runs(batch: StepBatch, profiles: Sequence[Profile], block_size: int, window: int | None, empty_slot: int) -> Iterator[Run]:
    """Cut a step into runs.

    Args:
        batch: the step.
        profiles: of the engine.
        block_size: tokens of a block.
        window: a token sees itself and the `window` - 1 before it, and older ones are not read; None: all.
        empty_slot: holds zeros for ever; what a run is padded with reads it.
    """
    longest = max(profile.new.most for profile in profiles)
    decodes: list[_Piece] = []
    for s, past in enumerate(batch.past_lengths.tolist()):
        start, end = int(batch.starts[s]), int(batch.starts[s + 1])
        blocks = batch.block_ids[batch.block_starts[s] : batch.block_starts[s + 1]]
        for at in range(start, end, longest):
            piece = _piece(blocks, at, min(at + longest, end), past + at - start, block_size, window)
            if end - start == 1:
                decodes.append(piece)
            else:
                yield _run(batch, [piece], profiles, empty_slot)
    group: list[_Piece] = []
    for piece in sorted(decodes, key=lambda piece: piece.reach):
        if group and choose(profiles, len(group) + 1, 1, _padded(piece.reach, profiles)) is None:
            yield _run(batch, group, profiles, empty_slot)
            group = []
        group.append(piece)
    if group:
        yield _run(batch, group, profiles, empty_slot)


def _piece(blocks: NDArray[np.int32], start: int, end: int, past: int, block_size: int, window: int | None) -> _Piece:
    first = 0 if window is None else max(0, past - window + 1)
    return _Piece(start, end, first, past, slots_of(blocks, np.arange(first, past + end - start), block_size))


def _padded(reach: int, profiles: Sequence[Profile]) -> int:
    """The length of the past that a run is padded to: at least 1, since the graph takes no empty one."""
    return min(max(-(-reach // PAST_STEP) * PAST_STEP, 1), max(profile.past.most for profile in profiles))


def _run(batch: StepBatch, pieces: Sequence[_Piece], profiles: Sequence[Profile], empty_slot: int) -> Run:
    new = pieces[0].end - pieces[0].start
    past = _padded(max(piece.reach for piece in pieces), profiles)
    slots, positions = (np.full((len(pieces), past), fill, np.int32) for fill in (empty_slot, UNSEEN))
    for row, piece in enumerate(pieces):
        slots[row, : piece.reach] = piece.slots[: piece.reach]
        positions[row, : piece.reach] = np.arange(piece.first, piece.past)
    tokens = np.concatenate([np.arange(piece.start, piece.end) for piece in pieces])
    asked, rows = _asked(batch.logits_rows, tokens)
    profile = choose(profiles, len(pieces), new, past)
    if profile is None:  # a step that is larger than what the model was created for
        raise ValueError(f"{len(pieces)} sequences of {new} new tokens behind {past} are more than this model was created for")
    inputs = {
        "token_ids": batch.token_ids[tokens].reshape(-1, new).astype(np.int32),
        "positions": batch.positions[tokens].reshape(-1, new).astype(np.int32),
        "past_slots": slots,
        "past_positions": positions,
        "logits_rows": (asked if len(asked) else np.zeros(1, np.int64)).astype(np.int32),
    }
    return Run(profile, inputs, np.concatenate([piece.slots[piece.reach :] for piece in pieces]), rows)


def _asked(logits_rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which of these tokens have logits asked for, counted among them, and where these stand in `logits_rows`."""
    at = np.searchsorted(logits_rows, tokens)
    inside = at < len(logits_rows)
    wanted = np.zeros(len(tokens), np.bool_)
    wanted[inside] = logits_rows[at[inside]] == tokens[inside]
    return np.flatnonzero(wanted), at[wanted]
