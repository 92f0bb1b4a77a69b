"""A step's logits, as much of each row as the sampler needs: all of it, or the likeliest tokens where the backend tells those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import GenerativeModel, TopLogits, TopOutput
from penstock.executor.batch import Built
from penstock.executor.sampling import Row, Sampled, Sampler

__all__ = ["StepLogits", "compute"]


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a step has told.

    Attributes:
        logits: float32 [rows told whole, vocabulary].
        top: of rows that are not told whole; None: all are, in order.
    """

    logits: NDArray[np.float32]
    top: TopOutput | None = None

    def row(self, index: int) -> NDArray[np.float32]:
        """One that was asked for whole, as those of prompts are."""
        row: NDArray[np.float32] = self.logits[index if self.top is None else self.top.whole[index]]
        return row

    def sample(self, sampler: Sampler, drawing: Sequence[int] | None, rows: Sequence[Row]) -> list[Sampled]:
        """One token for each of `rows`, which are those rows of the step's in `drawing`, or all."""
        if self.top is None:
            return sampler.sample(self.logits if drawing is None else self.logits[list(drawing)], rows)
        places = range(len(rows)) if drawing is None else drawing
        return [self._sample(self.top, sampler, place, row) for place, row in zip(places, rows, strict=True)]

    def _sample(self, top: TopOutput, sampler: Sampler, place: int, row: Row) -> Sampled:
        whole = int(top.whole[place])
        if whole >= 0:
            return sampler.sample(self.logits[whole : whole + 1], [row])[0]
        few = slice(int(top.starts[place]), int(top.starts[place + 1]))
        return sampler.sample_likeliest(top.ids[few], top.values[few], row)


def compute(model: GenerativeModel, built: Built, rows: Sequence[Row]) -> StepLogits:
    """Have a model compute a step, of which `rows` are to be drawn, in the order of `built.drawing`.

    Raises:
        Exception: whatever the model raises.
    """
    if isinstance(model, TopLogits) and model.most_top:
        counts = _counts(built, rows, model.most_top)
        if counts.any():
            top = model.step_top(built.batch, counts)
            return StepLogits(top.logits, top)
    return StepLogits(model.step(built.batch).logits)


def _counts(built: Built, rows: Sequence[Row], most: int) -> NDArray[np.int32]:
    """How many of the likeliest tokens decide each of the step's rows; 0 where that is more than `most`, or every token counts."""
    counts = np.zeros(len(built.batch.logits_rows), np.int32)
    deciding = np.fromiter((row.deciding for row in rows), np.int64, len(rows))
    counts[slice(None) if built.drawing_rows is None else built.drawing_rows] = np.where(deciding <= most, deciding, 0)
    return counts
