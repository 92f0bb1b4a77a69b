"""Steps of a few decoding sequences, computed in two halves where that is quicker.

A processor without bfloat16 widens weights of 8 bits to float32 as it multiplies. With AVX2 a step of five rows takes nearly twice
as long there as one of four, so that eight sequences may take longer than two times four. Where memory is what limits, reading every
weight twice is worse. So both are tried on the first steps of each size. The logits are the same bits, with AVX2 at least.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from penstock.backends.contract import StepBatch

__all__ = ["SIZES", "Halving", "halves"]

SIZES = range(5, 9)
"""Numbers of sequences whose halves a kernel takes at a time."""

_TRIALS = 4


class Halving:
    """What steps of each size took, whole and in halves."""

    def __init__(self) -> None:
        self._times: dict[tuple[int, bool], list[float]] = {(size, halved): [] for size in SIZES for halved in (False, True)}

    def wanted(self, size: int) -> bool:
        """Whether the next step of so many sequences is to be computed in halves."""
        whole, halved = self._times[size, False], self._times[size, True]
        if len(halved) < _TRIALS or len(whole) < _TRIALS:
            return len(halved) < len(whole)
        return min(halved) < min(whole)

    def took(self, size: int, seconds: float, *, halved: bool) -> None:
        """A step of so many sequences is done. What disturbs one makes it longer, so the shortest counts."""
        times = self._times[size, halved]
        if len(times) < _TRIALS:
            times.append(seconds)


def halves(batch: StepBatch) -> tuple[StepBatch, StepBatch]:
    """Both halves of a step that brings each sequence one token."""
    middle = (len(batch.token_ids) + 1) // 2
    return _part(batch, slice(0, middle)), _part(batch, slice(middle, len(batch.token_ids)))


def _part(batch: StepBatch, of: slice) -> StepBatch:
    starts = batch.block_starts[of.start : of.stop + 1]
    rows = batch.logits_rows
    return replace(
        batch,
        token_ids=batch.token_ids[of],
        positions=batch.positions[of],
        past_lengths=batch.past_lengths[of],
        starts=np.arange(of.stop - of.start + 1, dtype=np.int32),
        block_ids=batch.block_ids[starts[0] : starts[-1]],
        block_starts=starts - starts[0],
        logits_rows=rows[(rows >= of.start) & (rows < of.stop)] - of.start,
    )
