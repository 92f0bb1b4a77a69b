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

    def touched(self, masked: Sequence[int]) -> NDArray[np.int64]:
        """The ids, rising, of the tokens that `apply` changes."""
        return np.unique(np.concatenate((self._bias_ids, self._ids[: len(self._slots)], np.array(masked, np.int64))))

    def apply(self, logits: NDArray[np.float32], masked: Sequence[int], ids: NDArray[np.int64] | None = None) -> None:
        """Change logits in place; `masked` tokens become impossible.

        Args:
            logits: a row of them, or those of `ids`.
            masked: tokens.
            ids: rising, all that are `touched` among them; None: all there are.
        """
        if len(self._bias_ids):
            logits[_places(self._bias_ids, ids)] += self._bias
        if self._slots:
            self._penalize(logits, _places(self._ids[: len(self._slots)], ids))
        if masked:
            logits[_places(np.array(masked, np.int64), ids)] = -np.inf

    def _penalize(self, logits: NDArray[np.float32], places: NDArray[np.int64]) -> None:
        p = self._parameters
        counts, values = self._counts[: len(self._slots)], logits[places]
        if p.repetition_penalty != 1.0:
            penalty = np.float32(p.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        values -= counts * np.float32(p.frequency_penalty) + (counts > 0) * np.float32(p.presence_penalty)
        logits[places] = values


def _places(tokens: NDArray[np.int64], ids: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Where the logits of tokens stand among those of `ids`, or of all."""
    return tokens if ids is None else np.searchsorted(ids, tokens)
