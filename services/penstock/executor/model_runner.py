"""The model as the engine computes with it: timed, watched, and given up when it fails twice in a row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listing
from contextlib import contextmanager
from typing import cast

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import GenerativeModel, ModelLost, PrefixCopies, TopLogits
from penstock.backends.kv_abilities import prefix_copies
from penstock.backends.reports import text_of, what_was_raised
from penstock.common.logs import logger
from penstock.common.step_times import StepTimes
from penstock.executor.batch import Built
from penstock.executor.engine_config import EngineConfig
from penstock.executor.meter import Meter, StepFacts
from penstock.executor.sampling import Row
from penstock.executor.step_logits import StepLogits, compute
from penstock.executor.step_planner import Step

__all__ = ["EngineDead", "ModelRunner", "StepFailed"]

# A step that takes so many times what was measured hangs: other work on the machine may double it, or more.
_STALLED = 4.0
# Bytes of a prefix: a copy that is slower hangs.
_LEAST_COPIED_PER_SECOND = 1e8


class EngineDead(RuntimeError):
    """The engine can not go on; the text says why."""


class StepFailed(RuntimeError):
    """The backend has raised in a step; the text says what. `again`: it did so in the step before, too."""

    def __init__(self, reason: str, *, again: bool) -> None:
        super().__init__(reason)
        self.again = again


class ModelRunner:
    """Runs steps of one model, in the engine's thread.

    Attributes:
        meter: told of each step.
        times: by which it is judged whether a step is stalled; None: none were measured.
        step_seconds: that the last step took.
    """

    def __init__(self, model: GenerativeModel, config: EngineConfig, meter: Meter) -> None:
        self.model = model
        self.meter = meter
        self.times: StepTimes | None = None
        self.step_seconds = 0.0
        self._config = config
        self._steps = 0
        self._failed_step = -1

    def watch(self, seconds: float = 0.0) -> None:
        """Something begins that should take no longer: `stall_seconds` pass beyond that before the engine counts as stalled."""
        self.meter.begin(time.monotonic() + self._config.stall_seconds + seconds)

    def run(self, step: Step, built: Built, rows: Listing[Row]) -> StepLogits:
        """The logits of a step, of which `rows` are to be drawn.

        Raises:
            StepFailed: the backend has raised.
            EngineDead: there is no more model.
        """
        began = time.monotonic()
        self._steps += 1
        decodes = step.counts.count(1)
        prompt_tokens = int(built.batch.starts[-1]) - decodes
        # Not of one whose first token came from elsewhere: it has made no step here.
        next_tokens = sum(
            count == 1 and s.first_token_at > 0 and s.first_step_at > 0
            for s, count in zip(step.sequences, step.counts, strict=True)
        )
        for sequence in step.sequences:
            if not sequence.first_step_at:
                sequence.first_step_at = began
        self.watch(self._expected(built, prompt_tokens, decodes))
        try:
            with self._failing():
                return compute(self.model, built, rows)
        finally:
            self.step_seconds = time.monotonic() - began
            self.meter.computed(StepFacts(self.step_seconds, decodes, prompt_tokens, next_tokens))

    def whole_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the last step's logits that it did not tell whole.

        Raises:
            StepFailed: the backend has raised.
            EngineDead: there is no more model.
        """
        with self._failing():
            return cast("TopLogits", self.model).rows_of_top(rows)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Whatever the model raises is the step's failure."""
        try:
            yield
        except ModelLost as error:
            raise EngineDead(text_of(error)) from error
        except Exception as error:
            again = self._failed_step == self._steps - 1
            self._failed_step = self._steps
            raise StepFailed(what_was_raised(error), again=again) from error

    def _expected(self, built: Built, prompt_tokens: int, decodes: int) -> float:
        """Seconds that a step may take."""
        if self.times is None:
            return prompt_tokens * self._config.stall_seconds_per_prompt_token
        return _STALLED * self.times.most_seconds(prompt_tokens, decodes, int(built.batch.past_lengths.max()))

    def prefix_copier(self) -> Callable[[list[int], list[int]], int] | None:
        """Copies the blocks of a prefix into others, as `PrefixCopies` does; None where sequences share them.

        Raises:
            TypeError: the model's cache says that they are copied, and the model can not.
        """
        copies = prefix_copies(self.model)
        return None if copies is None else lambda source, target: self._copy(copies, source, target)

    def _copy(self, copies: PrefixCopies, source: list[int], target: list[int]) -> int:
        self.watch(len(source) * self.model.kv.bytes_per_block / _LEAST_COPIED_PER_SECOND)
        try:
            return copies.copy_prefix(source, target)
        except ModelLost as error:
            raise EngineDead(text_of(error)) from error
        except Exception as error:  # noqa: BLE001 - the contract lets a backend raise anything; the prefix is computed instead
            logger().warning("prefix not copied", error=what_was_raised(error))
            return 0
