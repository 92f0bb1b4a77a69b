"""From a step's plan to the arrays that a backend computes on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import StepBatch
from penstock.executor.sequence import Sequence
from penstock.executor.step_planner import Step

__all__ = ["Built", "PromptRows", "build"]


@dataclass(frozen=True, slots=True)
class PromptRows:
    """`count` rows of logits, from `first` on, that belong to places of a sequence's prompt, from `place` on."""

    sequence: Sequence
    first: int
    count: int
    place: int


@dataclass(frozen=True, slots=True)
class Built:
    """A batch, and whose rows of logits it gives.

    Attributes:
        drawing: the sequences whose next token is drawn.
        drawing_rows: their rows, in the same order; None: these are all rows.
        prompts: rows that are wanted for log-probabilities of prompts.
    """

    batch: StepBatch
    drawing: list[Sequence]
    drawing_rows: list[int] | None
    prompts: list[PromptRows]


def build(step: Step, block_size: int) -> Built:
    """Build a step's batch."""
    sequences, count = step.sequences, len(step.sequences)
    past = np.fromiter([s.computed for s in sequences], np.int32, count)
    new = np.fromiter(step.counts, np.int32, count)
    starts = np.zeros(count + 1, np.int32)
    np.cumsum(new, out=starts[1:])
    needed = (past + new + (block_size - 1)) // block_size
    block_starts = np.zeros(count + 1, np.int32)
    np.cumsum(needed, out=block_starts[1:])
    block_ids = np.concatenate([s.table[:n] for s, n in zip(sequences, needed.tolist(), strict=True)])
    if len(sequences) == starts[-1] and all(s.computed + 1 == len(s.ids) for s in sequences):
        token_ids = np.fromiter([s.ids[-1] for s in sequences], np.int64, count)
        positions = past.astype(np.int64)
        rows, drawing, drawing_rows, prompts = np.arange(count), sequences, None, list[PromptRows]()
    else:
        token_ids = np.concatenate([_new_tokens(s, n) for s, n in zip(sequences, step.counts, strict=True)])
        positions = np.arange(starts[-1]) + np.repeat(past - starts[:-1], new)
        rows, drawing, drawing_rows, prompts = _choose_rows(step, starts.tolist())
    return Built(StepBatch(token_ids, positions, past, starts, block_ids, block_starts, rows), drawing, drawing_rows, prompts)


def _new_tokens(sequence: Sequence, count: int) -> NDArray[np.int64]:
    return np.array(sequence.ids[sequence.computed : sequence.computed + count], np.int64)


def _choose_rows(step: Step, starts: list[int]) -> tuple[NDArray[np.int64], list[Sequence], list[int] | None, list[PromptRows]]:
    """The rows whose logits are wanted: the last of each sequence that is then complete, and places of prompts."""
    rows: list[int] = []
    drawing: list[Sequence] = []
    drawing_rows: list[int] = []
    prompts: list[PromptRows] = []
    for sequence, count, start in zip(step.sequences, step.counts, starts, strict=False):
        end = sequence.computed + count
        if sequence.prompt_logprobs is not None and sequence.wants_prompt_logprobs:
            place = max(sequence.computed, len(sequence.prompt_logprobs))
            places = range(place, min(end, sequence.prompt_length - 1))
            if places:
                prompts.append(PromptRows(sequence, len(rows), len(places), place))
                rows.extend(start + p - sequence.computed for p in places)
        if end == len(sequence.ids):
            drawing.append(sequence)
            drawing_rows.append(len(rows))
            rows.append(start + count - 1)
    return np.array(rows, np.int64), drawing, drawing_rows if prompts else None, prompts
