"""How long a model's steps take: measured at the start, before anything else runs.

Steps are computed as the engine computes them, on blocks that nobody holds yet: decoding by batch, prefill by chunk, and one of
each with much context, from which what context adds is found. Sizes double from one measurement to the next. A size is left out
once its measurement would take more than a share of the budget, and so are larger chunks once prefill gains nothing by them. A
step is repeated for a while and the fastest counts: what disturbs a step makes it longer.

Main memory that was never written is one page of zeros wherever it is read. So decoding with much context reads the blocks that
prefill has filled, each in one sequence alone. An accelerator's memory is there from the start, and takes a batch that can be told
from the noise.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from penstock.backends.contract import GenerativeModel, StepBatch
from penstock.common.step_times import Curve, StepTimes

__all__ = ["Shape", "measure"]

_DECODE_CONTEXT = 16
_FIRST_CHUNK = 16
_LONG_PAST = 2048
# Contexts that differ by less are told apart by noise alone.
_LEAST_DIFFERENCE = 8
# Of the budget: one step at most, repeats of one step, and all of decoding without context.
_STEP_SHARE, _REPEAT_SHARE, _DECODE_SHARE = 0.3, 0.03, 0.35
_MOST_REPEATS = 5
# Beyond this chunk, so many in a row, each twice as long and less than this much faster, end the search.
_LONG_CHUNK, _VAIN, _WORTH_DOUBLING = 256, 2, 1.03


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a step of the engine may hold.

    Attributes:
        max_batch_size: sequences.
        max_batch_tokens: tokens.
        context_length: tokens of one sequence.
        chunked: whether a prompt may come in several steps.
    """

    max_batch_size: int
    max_batch_tokens: int
    context_length: int
    chunked: bool = True


def measure(model: GenerativeModel, shape: Shape, budget: float, clock: Callable[[], float] = time.perf_counter) -> StepTimes:
    """Measure a model whose engine has not started. Writes to its KV blocks, so that no cached prefix may stand there.

    Args:
        model: what is measured.
        shape: of the engine's steps.
        budget: seconds that this takes at most; steps that are needed in any case may take it over that.
        clock: tells seconds.

    Raises:
        Exception: whatever the model raises in a step.
    """
    return _Measurement(model, shape, budget, clock).run()


class _Measurement:
    def __init__(self, model: GenerativeModel, shape: Shape, budget: float, clock: Callable[[], float]) -> None:
        self._model = model
        self._shape = shape
        self._budget = budget
        self._clock = clock
        self._began = clock()
        self._block_size = model.kv.block_size
        self._longest = min(shape.context_length, model.kv.blocks * model.kv.block_size)
        self._filled = 0

    def run(self) -> StepTimes:
        context = min(_DECODE_CONTEXT, self._longest)
        decode = self._decode(context)
        prefill = self._prefill()
        return StepTimes(
            prefill=Curve.through(prefill),
            prefill_pair_seconds=self._pair_seconds(prefill),
            decode=Curve.through(decode),
            decode_context=context,
            decode_token_seconds=self._token_seconds(decode, context),
        )

    def _decode(self, context: int) -> dict[int, float]:
        most = min(self._shape.max_batch_size, self._model.kv.blocks // self._blocks(context))
        measured: dict[int, float] = {}
        for batch in _doubling(1, most):
            if measured and not self._affords(2 * max(measured.values()), within=_DECODE_SHARE):
                break
            measured[batch] = self._time(batch, 1, context - 1, likely=2 * max(measured.values(), default=math.inf))
        return measured

    def _prefill(self) -> dict[int, float]:
        most = min(self._shape.max_batch_tokens, self._longest)
        measured: dict[int, float] = {}
        rate, vain = 0.0, 0
        for chunk in _doubling(min(_FIRST_CHUNK, most), most):
            if measured and not self._affords(2 * max(measured.values()), within=0.8):
                break
            measured[chunk] = self._time(1, chunk, 0, likely=2 * max(measured.values(), default=math.inf))
            self._filled = max(self._filled, chunk)
            vain = 0 if chunk / measured[chunk] > rate * _WORTH_DOUBLING else vain + 1
            rate = max(rate, chunk / measured[chunk])
            if vain >= _VAIN and chunk >= _LONG_CHUNK:
                break
        return measured

    def _pair_seconds(self, prefill: dict[int, float]) -> float:
        """Of the largest chunk that leaves room behind itself and is not long: more pairs, less noise."""
        room = {chunk: min(_LONG_PAST, self._longest - chunk) for chunk in prefill}
        if not self._shape.chunked:
            return 0.0
        chunks = [c for c in prefill if room[c] > 0 and self._affords(3 * prefill[c], within=1.0)]
        if not chunks:
            return 0.0
        chunk = max(chunks, key=lambda c: c * room[c])
        return max(0.0, self._time(1, chunk, room[chunk]) - prefill[chunk]) / (chunk * room[chunk])

    def _token_seconds(self, decode: dict[int, float], context: int) -> float:
        if self._model.device == "cpu":
            batch, long = 1, min(self._filled, self._longest - 1)
        else:
            batch = max(decode)
            long = min(_LONG_PAST, self._longest - 1, self._model.kv.blocks // batch * self._block_size - 1)
        if long < _LEAST_DIFFERENCE * context or not self._affords(2 * decode[batch], within=1.0):
            return 0.0
        return max(0.0, self._time(batch, 1, long) - decode[batch]) / (batch * (long + 1 - context))

    def _affords(self, seconds: float, *, within: float) -> bool:
        """Whether a step of about so many seconds may be measured while no more than this share of the budget is spent."""
        spent = self._clock() - self._began
        return seconds <= _STEP_SHARE * self._budget and spent + seconds <= within * self._budget

    def _time(self, sequences: int, tokens: int, past: int, *, likely: float = math.inf) -> float:
        """Seconds of the fastest of a few equal steps. The first one may find kernels that are still to be compiled.

        More than is `likely` is taken for disturbed, and tried again even where that takes longer.
        """
        batch = self._batch(sequences, tokens, past)
        began = self._clock()
        fastest = self._step(batch)
        for _ in range(_MOST_REPEATS):
            share = _REPEAT_SHARE if fastest <= likely else _STEP_SHARE
            if self._clock() - began > share * self._budget:
                break
            fastest = min(fastest, self._step(batch))
        return fastest

    def _step(self, batch: StepBatch) -> float:
        began = self._clock()
        self._model.step(batch)
        return max(self._clock() - began, 1e-9)

    def _batch(self, sequences: int, tokens: int, past: int) -> StepBatch:
        blocks = self._blocks(past + tokens)
        each = np.arange(sequences + 1, dtype=np.int32)
        return StepBatch(
            token_ids=np.zeros(sequences * tokens, np.int64),
            positions=np.tile(np.arange(past, past + tokens), sequences),
            past_lengths=np.full(sequences, past, np.int32),
            starts=each * np.int32(tokens),
            block_ids=np.arange(sequences * blocks, dtype=np.int32),
            block_starts=each * np.int32(blocks),
            logits_rows=np.arange(1, sequences + 1, dtype=np.int64) * tokens - 1,
        )

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)


def _doubling(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first … and `last`, which is at least `first`."""
    sizes = [first]
    while 2 * sizes[-1] < last:
        sizes.append(2 * sizes[-1])
    return [*sizes, last] if last > sizes[-1] else sizes
