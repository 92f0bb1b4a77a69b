"""How long a model's steps take: measured at the start, before anything else runs.

Steps are computed as the engine computes them, on blocks that nobody holds yet: decoding by batch, prefill by chunk, and one of
each with much context, from which what context adds is found. Sizes double from one measurement to the next. A size is left out
once its measurement would take more than a share of the budget, and so are larger chunks once prefill gains nothing by them. A
step is repeated for a while and the fastest counts: what disturbs a step makes it longer.

What stands before a step is imported where the model can, and prefill then leaves room for a batch with much context behind it:
imports are not timed but take of the budget. Where it can not, it is computed, in steps that are not timed either; much context
then is what prefill has left in the cache, and a little more while the budget lasts, or a batch of such sequences where prefill is
fast, as on an accelerator.
Decoding by batch begins behind one token either way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from penstock.backends.contract import GenerativeModel
from penstock.common.step_times import Curve, StepTimes
from penstock.executor.measured_steps import MeasuredSteps

__all__ = ["Shape", "measure"]

_DECODE_CONTEXT = 2
_FIRST_CHUNK = 16
_LONG_PAST = 2048
# Less context is told from none by noise alone.
_LEAST_CONTEXT = 128
# Where pasts are imported: tokens of all sequences of a step, of each at most, and the largest batch that is measured with them.
_IMPORTED, _LONGEST_IMPORTED, _IMPORTED_BATCH = 4096, 1024, 8
# Of the budget: one measurement at most, repeats of one step, and what is spent once decoding without context, prefill (less where
# imports follow), and what stands before the chunk with context are done.
_STEP_SHARE, _REPEAT_SHARE, _DECODE_SHARE, _PREFILL_SHARE, _PAST_SHARE = 0.3, 0.03, 0.35, 0.75, 0.85
_PREFILL_SHARE_BEFORE_IMPORTS = 0.6
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
        imports: whether the model takes in KV that it has not computed.
    """

    max_batch_size: int
    max_batch_tokens: int
    context_length: int
    chunked: bool = True
    imports: bool = False


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


class _Far(NamedTuple):
    """A step of decoding with much context."""

    batch: int
    context: int


class _Measurement:
    def __init__(self, model: GenerativeModel, shape: Shape, budget: float, clock: Callable[[], float]) -> None:
        self._model = model
        self._shape = shape
        self._budget = budget
        self._clock = clock
        self._began = clock()
        self._longest = min(shape.context_length, model.kv.blocks * model.kv.block_size)
        self._steps = MeasuredSteps(model, shape.max_batch_tokens, clock, imports=shape.imports)

    def run(self) -> StepTimes:
        context = min(_DECODE_CONTEXT, self._longest)
        decode = self._decode(context)
        prefill = self._prefill()
        far = self._imported_context(decode)
        behind_far = math.inf if far is None else self._time(far.batch, 1, far.context)
        of_pair = self._pair_seconds(prefill)
        if far is None:
            of_token = self._token_seconds(decode, prefill, context)
        else:
            if self._affords(2 * (decode[far.batch] + behind_far) + self._steps.import_seconds, within=1.0):
                # Once more, a while later: the difference of two times is spoilt by what disturbs either of them.
                decode[far.batch] = min(decode[far.batch], self._time(far.batch, 1, context - 1))
                behind_far = min(behind_far, self._time(far.batch, 1, far.context))
            of_token = max(0.0, behind_far - decode[far.batch]) / (far.batch * (far.context + 1 - context))
        return StepTimes(
            prefill=Curve.through(prefill),
            prefill_pair_seconds=of_pair,
            decode=Curve.through(decode),
            decode_context=context,
            decode_token_seconds=of_token,
        )

    def _decode(self, context: int) -> dict[int, float]:
        most = min(self._shape.max_batch_size, self._steps.room(context))
        measured: dict[int, float] = {}
        for batch in _doubling(1, most):
            # Twice as long at the most, behind the pasts of as many sequences as are in the cache already.
            if measured and not self._affords(3 * max(measured.values()), within=_DECODE_SHARE):
                break
            measured[batch] = self._time(batch, 1, context - 1, likely=2 * max(measured.values(), default=math.inf))
        return measured

    def _prefill(self) -> dict[int, float]:
        most = min(self._shape.max_batch_tokens, self._longest)
        within = _PREFILL_SHARE_BEFORE_IMPORTS if self._shape.imports else _PREFILL_SHARE
        measured: dict[int, float] = {}
        rate, vain = 0.0, 0
        for chunk in _doubling(min(_FIRST_CHUNK, most), most):
            if measured and not self._affords(2 * max(measured.values()), within=within):
                break
            measured[chunk] = self._time(1, chunk, 0, likely=2 * max(measured.values(), default=math.inf))
            vain = 0 if chunk / measured[chunk] > rate * _WORTH_DOUBLING else vain + 1
            rate = max(rate, chunk / measured[chunk])
            if vain >= _VAIN and chunk >= _LONG_CHUNK:
                break
        return measured

    def _pair_seconds(self, prefill: dict[int, float]) -> float:
        """Of the largest chunk that leaves room before itself and is not long: more pairs, less noise."""
        room = {chunk: min(_LONG_PAST, self._longest - chunk) for chunk in prefill}
        if not self._shape.chunked:
            return 0.0
        chunks = [c for c in prefill if room[c] > 0 and self._affords(2 * prefill[c], within=1.0)]
        if not chunks:
            return 0.0
        chunk = max(chunks, key=lambda c: c * room[c])
        if self._shape.imports:
            past = min(_LONGEST_IMPORTED, room[chunk])
            return max(0.0, self._time(1, chunk, past) - prefill[chunk]) / (chunk * past)
        while self._steps.standing + chunk <= room[chunk] and self._affords(prefill[chunk], within=_PAST_SHARE):
            self._steps.run(1, chunk, self._steps.standing)
        past = min(self._steps.standing, room[chunk])
        return max(0.0, self._time(1, chunk, past) - prefill[chunk]) / (chunk * past)

    def _imported_context(self, decode: dict[int, float]) -> _Far | None:
        """The largest batch, not too large, that has room for much context, and can be measured; None: there is none."""
        if not self._shape.imports:
            return None
        for batch in sorted((b for b in decode if b <= _IMPORTED_BATCH), reverse=True):
            context = min(_IMPORTED // batch, _LONGEST_IMPORTED, self._longest - 1)
            if (
                self._steps.room(context + 1) >= batch
                and context >= _LEAST_CONTEXT
                and self._affords(2 * decode[batch], within=1.0)
            ):
                return _Far(batch, context)
        return None

    def _token_seconds(self, decode: dict[int, float], prefill: dict[int, float], context: int) -> float:
        """Of the largest batch whose context can be computed; the one sequence that stands in the cache takes nothing."""
        for batch in sorted(decode, reverse=True):
            long = self._steps.standing if batch == 1 else self._context_of_each(batch, prefill)
            long = min(long, self._longest - 1)
            cost = 2 * decode[batch] + (0.0 if batch == 1 else batch * prefill.get(long, 0.0))
            if long >= _LEAST_CONTEXT and self._affords(cost, within=1.0):
                return max(0.0, self._time(batch, 1, long) - decode[batch]) / (batch * (long + 1 - context))
        return 0.0

    def _context_of_each(self, batch: int, prefill: dict[int, float]) -> int:
        """Tokens of the largest chunk measured that each sequence of a batch has room for, and for one more; 0: none."""
        return max((c for c in prefill if c < self._longest and self._steps.room(c + 1) >= batch), default=0)

    def _affords(self, seconds: float, *, within: float) -> bool:
        """Whether a step of about so many seconds may be measured while no more than this share of the budget is spent."""
        spent = self._clock() - self._began
        return seconds <= _STEP_SHARE * self._budget and spent + seconds <= within * self._budget

    def _time(self, sequences: int, tokens: int, past: int, *, likely: float = math.inf) -> float:
        """Seconds of the fastest of a few equal steps. The first one may find kernels that are still to be compiled.

        More than is `likely` is taken for disturbed, and tried again even where that takes longer.
        """
        spent = fastest = self._steps.run(sequences, tokens, past)
        for _ in range(_MOST_REPEATS):
            share = _REPEAT_SHARE if fastest <= likely else _STEP_SHARE
            if spent > share * self._budget:
                break
            seconds = self._steps.run(sequences, tokens, past)
            spent, fastest = spent + seconds, min(fastest, seconds)
        return fastest


def _doubling(first: int, last: int) -> list[int]:
    """first, 2 first, 4 first … and `last`, which is at least `first`."""
    sizes = [first]
    while 2 * sizes[-1] < last:
        sizes.append(2 * sizes[-1])
    return [*sizes, last] if last > sizes[-1] else sizes
