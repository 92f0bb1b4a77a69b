"""Choosing from what was told of a row of logits that stayed on its device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["ToldRow"]


@dataclass(frozen=True, slots=True)
class ToldRow:
    """What is known of a row: its named tokens, the likeliest of the others, and the mass of all others.

    Attributes:
        ids: int64, rising: of the others all whose logit is at least that of the last of them.
        logits: of these, finite or -inf, the largest finite.
        named: int64, rising: tokens that the request's changes touch.
        named_logits: of these.
        log_mass: the logarithm of the sum of exp(logit) over all others.
        tempered_log_mass: the same of exp(logit / temperature).
    """

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]
    named: NDArray[np.int64]
    named_logits: NDArray[np.float32]
    log_mass: float
    tempered_log_mass: float

    @property
    def least(self) -> np.float32:
        """Every token that is at least so likely is known."""
        least: np.float32 = self.logits.min()
        return least

    def together(self, named_logits: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """All tokens that are at least as likely as `least`, ids rising, where the named ones have these logits."""
        kept = named_logits >= self.least
        ids = np.concatenate((self.ids, self.named[kept]))
        order = np.argsort(ids, kind="stable")
        return ids[order], np.concatenate((self.logits, named_logits[kept]))[order]

    def total(self, largest: np.float32, named_logits: NDArray[np.float32], temperature: float) -> float:
        """The mass of all tokens, over the likeliest's, where the named ones have these logits and `largest` is the largest."""
        named = np.exp((named_logits.astype(np.float64) - largest) / temperature)
        return float(np.exp(self.tempered_log_mass - float(largest) / temperature) + named.sum())

    def normalizer(self) -> float:
        """The logarithm of the sum of exp(logit) over all tokens, as the model gave them."""
        return float(np.logaddexp.reduce(np.append(self.named_logits.astype(np.float64), self.log_mass)))
