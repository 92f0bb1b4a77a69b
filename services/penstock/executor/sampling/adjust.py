"""Changes to logits before a token is chosen: bias, penalties, and stop tokens that must not come yet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.executor.sampling.parameters import SamplingParameters

__all__ = ["Adjustment"]


class Adjustment:
    """The changes of one sequence, over the few token ids that they touch. Counts are kept up token by token.

    The order is vLLM's: bias, then repetition, frequency and presence penalty; then the mask.
    """

    def __init__(self, parameters: SamplingParameters, prompt: Iterable[int], output: Iterable[int]) -> None:
        self._parameters = parameters
        self._bias_ids = np.fromiter(parameters.logit_bias.keys(), np.int64, len(parameters.logit_bias))
        self._bias = np.fromiter(parameters.logit_bias.values(), np.float32, len(parameters.logit_bias))
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.float32)
        if parameters.repetition_penalty != 1.0:
            for token in prompt:
                self._slot(token)
        for token in output:
            self.count(token)

    @staticmethod
    def needed(parameters: SamplingParameters) -> bool:
        """Whether these parameters change any logit."""
        return parameters.penalizes or bool(parameters.logit_bias)

    def count(self, token: int) -> None:
        """Take note of an output token."""
        if self._parameters.penalizes:
            slot = self._slot(token)  # first: it may make the arrays longer
            self._counts[slot] += 1

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.resize(self._ids, 2 * slot)
            self._counts = np.concatenate((self._counts, np.zeros(slot, np.float32)))
        self._ids[slot] = token
        return slot

    def apply(self, row: NDArray[np.float32], masked: Sequence[int]) -> None:
        """Change a row of logits in place; `masked` tokens become impossible."""
        if len(self._bias_ids):
            row[self._bias_ids] += self._bias
        if self._slots:
            self._penalize(row)
        if masked:
            row[list(masked)] = -np.inf

    def _penalize(self, row: NDArray[np.float32]) -> None:
        p = self._parameters
        ids, counts = self._ids[: len(self._slots)], self._counts[: len(self._slots)]
        values = row[ids]
        if p.repetition_penalty != 1.0:
            penalty = np.float32(p.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= counts * np.float32(p.frequency_penalty) + (counts > 0) * np.float32(p.presence_penalty)
        row[ids] = values
