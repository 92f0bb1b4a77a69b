"""Sequences over a model's blocks, stepped by hand: the least that stands between a test and `GenerativeModel.step`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import GenerativeModel, StepBatch
from penstock.backends.kv_abilities import prefix_copies

__all__ = ["ALL", "LAST", "NONE", "Driver", "Piece", "SequenceState", "step_batch"]


@dataclass(slots=True)
class SequenceState:
    """A sequence: the tokens that stand in its blocks already, and the blocks."""

    length: int = 0
    blocks: list[int] = field(default_factory=list)


# Rows, counted from a piece's first token, where logits are wanted.
LAST, ALL, NONE = "last", "all", "none"


@dataclass(frozen=True, slots=True)
class Piece:
    """New tokens of one sequence in one step, and where their logits are wanted."""

    sequence: SequenceState
    ids: Sequence[int]
    rows: str = LAST

    def wanted(self) -> range:
        """Rows within the piece."""
        return {LAST: range(len(self.ids) - 1, len(self.ids)), ALL: range(len(self.ids)), NONE: range(0)}[self.rows]


class Driver:
    """Hands out blocks in an order of its own and steps the model.

    Args:
        model: what is driven.
        order: block ids in the order in which they are handed out; None: rising.
        prompt_logits: whether the model gives logits of every token.
    """

    def __init__(self, model: GenerativeModel, order: Sequence[int] | None = None, *, prompt_logits: bool = True) -> None:
        self.model = model
        self._prompt_logits = prompt_logits
        self._free = list(reversed(order if order is not None else range(model.kv.blocks)))

    def sequence(self, prefix: Sequence[int] = ()) -> SequenceState:
        """A new sequence behind full blocks that another one filled, shared or copied as the cache wants it."""
        size = self.model.kv.block_size
        copies = prefix_copies(self.model) if prefix else None
        if copies is None:
            return SequenceState(len(prefix) * size, list(prefix))
        sequence = SequenceState()
        self.extend(sequence, len(prefix) * size)
        sequence.length = copies.copy_prefix(prefix, sequence.blocks) * size
        return sequence

    def extend(self, sequence: SequenceState, tokens: int) -> None:
        """Give a sequence the blocks that it needs to hold so many tokens."""
        while len(sequence.blocks) * self.model.kv.block_size < tokens:
            sequence.blocks.append(self._free.pop())

    def release(self, sequence: SequenceState) -> None:
        """Take a sequence's blocks back, to be handed out next."""
        self._free.extend(reversed(sequence.blocks))
        sequence.blocks.clear()

    def step(self, *pieces: Piece) -> list[NDArray[np.float32]]:
        """One step; the logits of each piece, [rows wanted, vocabulary], copied."""
        for piece in pieces:
            self.extend(piece.sequence, piece.sequence.length + len(piece.ids))
        logits = self.model.step(step_batch(pieces)).logits.copy()
        for piece in pieces:
            piece.sequence.length += len(piece.ids)
        return np.split(logits, np.cumsum([len(piece.wanted()) for piece in pieces])[:-1])

    def prefill(self, ids: Sequence[int], chunk: int | None = None) -> tuple[SequenceState, NDArray[np.float32]]:
        """A new sequence of these tokens, `chunk` of them a step.

        Returns:
            the sequence, and the logits behind each token, or behind the last where the model gives no others.
        """
        sequence, parts, size = self.sequence(), [], chunk or len(ids)
        for start in range(0, len(ids), size):
            parts += self.step(Piece(sequence, ids[start : start + size], ALL if self._prompt_logits else LAST))
        return sequence, np.concatenate(parts) if self._prompt_logits else parts[-1]

    def logits(self, ids: Sequence[int], chunk: int | None = None) -> NDArray[np.float32]:
        """As `prefill`, and the blocks are free again."""
        sequence, logits = self.prefill(ids, chunk)
        self.release(sequence)
        return logits

    def follow(self, sequence: SequenceState, ids: Sequence[int]) -> NDArray[np.float32]:
        """Decode with given tokens, one a step; the logits behind each, [tokens, vocabulary]."""
        return np.concatenate([self.step(Piece(sequence, [token]))[0] for token in ids])

    def greedy(self, sequence: SequenceState, first: int, count: int) -> tuple[list[int], NDArray[np.float32]]:
        """Decode `count` steps, from `first` on always the likeliest token.

        Returns:
            the tokens that were given, beginning with `first`, and the logits behind each.
        """
        ids: list[int] = [first]
        found: list[NDArray[np.float32]] = []
        for _ in range(count):
            found += self.step(Piece(sequence, ids[-1:]))
            ids.append(int(found[-1].argmax()))
        return ids[:-1], np.concatenate(found)


def step_batch(pieces: Sequence[Piece]) -> StepBatch:
    """The batch that the contract asks for."""
    starts = np.cumsum([0, *(len(piece.ids) for piece in pieces)])
    past = [piece.sequence.length for piece in pieces]
    return StepBatch(
        token_ids=np.concatenate([np.asarray(piece.ids, np.int64) for piece in pieces]),
        positions=np.concatenate([np.arange(p, p + len(piece.ids), dtype=np.int64) for p, piece in zip(past, pieces, strict=True)]),
        past_lengths=np.array(past, np.int32),
        starts=starts.astype(np.int32),
        block_ids=np.array([block for piece in pieces for block in piece.sequence.blocks], np.int32),
        block_starts=np.cumsum([0, *(len(piece.sequence.blocks) for piece in pieces)]).astype(np.int32),
        logits_rows=np.array(
            [start + row for start, piece in zip(starts, pieces, strict=False) for row in piece.wanted()], np.int64
        ),
    )
