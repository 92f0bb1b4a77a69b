"""A step's logits, as much of each row as the sampler needs: all of it, or what decides where the backend tells that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import GenerativeModel, TopLogits, TopOutput, TopRequest
from penstock.executor.batch import Built
from penstock.executor.sampling import Row, Sampled, Sampler, ToldRow

__all__ = ["StepLogits", "StepTop", "compute"]


@dataclass(frozen=True, slots=True)
class StepTop:
    """What a step was asked for in place of rows, and what it told."""

    request: TopRequest
    output: TopOutput

    def row(self, index: int) -> ToldRow:
        """What was told of a row that was not told whole."""
        likeliest = slice(int(self.output.starts[index]), int(self.output.starts[index + 1]))
        named = slice(int(self.request.named_starts[index]), int(self.request.named_starts[index + 1]))
        log_mass, tempered_log_mass = self.output.log_masses[index].tolist()
        return ToldRow(
            ids=self.output.ids[likeliest],
            logits=self.output.values[likeliest],
            named=self.request.named[named],
            named_logits=self.output.named[named],
            log_mass=log_mass,
            tempered_log_mass=tempered_log_mass,
        )


@dataclass(frozen=True, slots=True)
class StepLogits:
    """What a step has told. Rows are asked for and drawn before the next one.

    Attributes:
        logits: float32 [rows told whole, vocabulary].
        top: of rows that are not told whole; None: all are, in order.
    """

    logits: NDArray[np.float32]
    top: StepTop | None = None

    def row(self, index: int) -> NDArray[np.float32]:
        """One that was asked for whole, as those of prompts are."""
        row: NDArray[np.float32] = self.logits[index if self.top is None else self.top.output.whole[index]]
        return row

    def sample(
        self,
        sampler: Sampler,
        drawing: Sequence[int] | None,
        rows: Sequence[Row],
        whole_rows: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    ) -> list[Sampled]:
        """One token for each of `rows`, which are those rows of the step's in `drawing`, or all.

        Args:
            sampler: of this vocabulary.
            drawing: their indices; None: they are all there are.
            rows: what is to be drawn.
            whole_rows: fetches those that were not told whole, where what was told does not decide.
        """
        if self.top is None:
            return sampler.sample(self.logits if drawing is None else self.logits[list(drawing)], rows)
        places = range(len(rows)) if drawing is None else drawing
        drawn = [self._sample(self.top, sampler, place, row) for place, row in zip(places, rows, strict=True)]
        open_ones = [i for i, sampled in enumerate(drawn) if sampled is None]
        if open_ones:
            entire = whole_rows(np.array([places[i] for i in open_ones], np.int64))
            for i, sampled in zip(open_ones, sampler.sample(entire, [rows[i] for i in open_ones]), strict=True):
                drawn[i] = sampled
        return [sampled for sampled in drawn if sampled is not None]

    def _sample(self, top: StepTop, sampler: Sampler, place: int, row: Row) -> Sampled | None:
        whole = int(top.output.whole[place])
        if whole >= 0:
            return sampler.sample(self.logits[whole : whole + 1], [row])[0]
        return sampler.sample_told(top.row(place), row)


def compute(model: GenerativeModel, built: Built, rows: Sequence[Row]) -> StepLogits:
    """Have a model compute a step, of which `rows` are to be drawn, in the order of `built.drawing`.

    Raises:
        Exception: whatever the model raises.
    """
    if isinstance(model, TopLogits) and model.most_top:
        request = _request(built, rows, model.most_top)
        if request.counts.any():
            output = model.step_top(built.batch, request)
            return StepLogits(output.logits, StepTop(request, output))
    return StepLogits(model.step(built.batch).logits)


def _request(built: Built, rows: Sequence[Row], most: int) -> TopRequest:
    """What decides each of the step's rows; those of prompts are wanted whole, and those that more than `most` tokens decide."""
    count = len(built.batch.logits_rows)
    counts, temperatures = np.zeros(count, np.int32), np.zeros(count)
    lengths = np.zeros(count + 1, np.int64)
    named: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    for place, row in zip(range(count) if built.drawing_rows is None else built.drawing_rows, rows, strict=True):
        deciding = row.deciding
        if 0 < deciding <= most:
            counts[place], temperatures[place] = deciding, row.mass_temperature
            ids = row.named
            if len(ids):
                lengths[place + 1] = len(ids)
                named.append(ids)
    return TopRequest(counts, np.cumsum(lengths), np.concatenate(named), temperatures)
