"""What an engine has done so far: written by its thread, read by any."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from penstock.executor.sequence import Finish

__all__ = ["Meter", "StepFacts"]

# Weight of the newest step in the moving averages.
_NEWEST = 0.1
# Steps with fewer prompt tokens say little about the speed of prefill.
_MANY_PROMPT_TOKENS = 64


@dataclass(frozen=True, slots=True)
class StepFacts:
    """One step of the backend.

    Attributes:
        decodes: sequences of which it computed one token.
        prompt_tokens: all others.
        next_tokens: sequences whose token before came from the step before.
    """

    seconds: float
    decodes: int
    prompt_tokens: int
    next_tokens: int


class Meter:
    """Sums since the start, and speeds as moving averages.

    Attributes:
        step_due: when the running step is taken for stalled, by `time.monotonic`; infinite between steps.
        prompted: prompt tokens of sequences that gave their first token.
        generated: output tokens.
        prefill_tokens_per_second: 0 until measured.
        steps_per_second: of decoding; 0 until measured.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.step_due = math.inf
        self.steps = 0
        self.prompted = 0
        self.generated = 0
        self.finished = dict.fromkeys(Finish, 0)
        self.prefill_tokens_per_second = 0.0
        self.steps_per_second = 0.0
        self.on_step: Callable[[StepFacts], None] | None = None

    def begin(self, due: float) -> None:
        """A step begins, and should end by then; said again within the step, it moves that time."""
        self.step_due = due

    def end(self) -> None:
        """It has ended, well or not."""
        self.step_due = math.inf

    def computed(self, facts: StepFacts) -> None:
        """The backend has computed the step, or failed."""
        self.steps += 1
        seconds = max(facts.seconds, 1e-9)
        if facts.prompt_tokens >= _MANY_PROMPT_TOKENS:
            self.prefill_tokens_per_second = _moved(self.prefill_tokens_per_second, facts.prompt_tokens / seconds)
        elif facts.decodes:
            self.steps_per_second = _moved(self.steps_per_second, 1 / seconds)
        if self.on_step is not None:
            self.on_step(facts)


def _moved(average: float, newest: float) -> float:
    return average + _NEWEST * (newest - average) if average else newest
