"""Steps of a few decoding sequences, computed in two halves where that is quicker.

A processor without bfloat16 widens short weights to float32 as it multiplies. With AVX2 and weights of 8 bits a step of five rows
takes nearly twice as long there as one of four, so that eight sequences may take longer than two times four. Where memory is what
limits, reading every weight twice is worse. So both are tried when a model is loaded.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from penstock.backends.contract import StepBatch

__all__ = ["LARGEST", "SIZES", "decoding", "halves", "halves_are_quicker"]

SIZES = range(5, 9)
"""Numbers of sequences whose halves a kernel takes at a time."""

LARGEST = SIZES[-1]

# Of each way; fewer where these take longer than so many seconds.
_MOST_RUNS, _SECONDS = 10, 2.0


def halves_are_quicker(
    whole: Callable[[], object], halved: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> bool:
    """Whether a step takes less time in halves. Both are run a few times in turn; the fastest of each counts."""
    began, fastest_whole, fastest_halved = clock(), math.inf, math.inf
    for _ in range(_MOST_RUNS):
        fastest_whole = min(fastest_whole, _seconds(whole, clock))
        fastest_halved = min(fastest_halved, _seconds(halved, clock))
        if clock() - began >= _SECONDS:
            break
    return fastest_halved < fastest_whole


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    began = clock()
    run()
    return clock() - began


def decoding(count: int) -> StepBatch:
    """A step of so many sequences behind one token each, in the first blocks of a cache."""
    each = np.arange(count + 1, dtype=np.int32)
    return StepBatch(
        token_ids=np.zeros(count, np.int64),
        positions=np.ones(count, np.int64),
        past_lengths=np.ones(count, np.int32),
        starts=each,
        block_ids=each[:-1],
        block_starts=each,
        logits_rows=np.arange(count, dtype=np.int64),
    )


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
