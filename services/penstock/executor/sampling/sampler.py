"""From a step's logits to tokens, with their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.executor.sampling.adjust import Adjustment
from penstock.executor.sampling.draw import FEW, Drawer, draw_likeliest
from penstock.executor.sampling.likeliest import top
from penstock.executor.sampling.parameters import SamplingParameters

__all__ = ["NotFinite", "Row", "Sampled", "Sampler", "TokenLogprob"]


class NotFinite(ArithmeticError):
    """A row of logits holds no number to choose by."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model, before any change by the request, took a token to be.

    Attributes:
        rank: 1 for the likeliest.
        top_ids: the likeliest tokens, best first, and beside them their log-probabilities.
    """

    logprob: float
    rank: int
    top_ids: list[int]
    top_logprobs: list[float]


@dataclass(slots=True)
class Row:
    """What is to be drawn from one row of logits.

    Attributes:
        position: of the token in the output, from 0.
        masked: ids that must not be drawn now.
        logprobs: how many of the likeliest tokens to tell; None: tell nothing.
    """

    parameters: SamplingParameters
    position: int
    adjustment: Adjustment | None = None
    masked: Sequence[int] = ()
    logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the largest logit is all that counts."""
        return self.parameters.greedy and self._unchanged

    @property
    def deciding(self) -> int:
        """How many of the likeliest tokens are all that counts, with those as likely as the last of them; 0: every token counts."""
        if not self._unchanged:
            return 0
        return 1 if self.parameters.greedy else self.parameters.top_k if self.parameters.top_k <= FEW else 0

    @property
    def _unchanged(self) -> bool:
        """Whether the model's logits are what counts, and only for the choice."""
        return self.adjustment is None and not self.masked and self.logprobs is None


@dataclass(frozen=True, slots=True)
class Sampled:
    """One token, or why there is none."""

    token: int
    logprob: TokenLogprob | None = None
    error: NotFinite | None = None


class Sampler:
    """Chooses the tokens of a step. Not for two threads at once."""

    def __init__(self, vocabulary_size: int) -> None:
        self._drawer = Drawer(vocabulary_size)
        self._work = np.empty(vocabulary_size, np.float32)
        self._nothing = Adjustment(SamplingParameters(), (), ())

    def sample(self, logits: NDArray[np.float32], rows: Sequence[Row]) -> list[Sampled]:
        """One token for each row of `logits` [rows, vocabulary], which may be overwritten."""
        plain = [i for i, row in enumerate(rows) if row.plain]
        if len(plain) == len(rows):
            return _greedy(logits)
        sampled: list[Sampled | None] = [None] * len(rows)
        for i in plain:
            sampled[i] = _greedy(logits[i : i + 1])[0]
        return [done or self._sample_row(logits[i], rows[i]) for i, done in enumerate(sampled)]

    def sample_likeliest(self, ids: NDArray[np.int64], logits: NDArray[np.float32], row: Row) -> Sampled:
        """The token that `sample` would choose, from the `Row.deciding` likeliest alone.

        Args:
            ids: rising, of all tokens whose logit is at least that of the last of them.
            logits: of these, finite or -inf, the largest finite.
            row: what is to be drawn.
        """
        if row.parameters.greedy:
            return Sampled(int(ids[logits.argmax()]))
        return Sampled(draw_likeliest(ids, logits, row.parameters, row.position))

    def _sample_row(self, logits: NDArray[np.float32], row: Row) -> Sampled:
        raw = logits
        if row.adjustment is not None or row.masked:
            if row.logprobs is not None:
                raw = logits.copy()
            (row.adjustment or self._nothing).apply(logits, row.masked)
        if not np.isfinite(logits.max()):
            return Sampled(0, error=_not_finite())
        token = int(logits.argmax()) if row.parameters.greedy else self._drawer.draw(logits, row.parameters, row.position)
        if row.logprobs is None:
            return Sampled(token)
        try:
            return Sampled(token, self.logprob(raw, token, row.logprobs))
        except NotFinite as error:  # a change by the request has hidden it from the choice
            return Sampled(0, error=error)

    def logprob(self, row: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
        """The log-probability of a token and of the `count` likeliest, by the logits as the model gave them.

        Raises:
            NotFinite: they hold a NaN or +inf, or nothing but -inf.
        """
        largest = row.max()
        if not np.isfinite(largest):
            raise _not_finite()
        np.exp(np.subtract(row, largest, out=self._work), out=self._work)
        normalizer = float(largest) + math.log(float(self._work.sum()))
        ids = top(row, count)
        return TokenLogprob(
            logprob=float(row[token]) - normalizer,
            rank=1 + int(np.count_nonzero(row > row[token])),
            top_ids=ids.tolist(),
            top_logprobs=(row[ids].astype(np.float64) - normalizer).tolist(),
        )


def _greedy(logits: NDArray[np.float32]) -> list[Sampled]:
    tokens = logits.argmax(axis=1)
    finite = np.isfinite(logits[np.arange(len(tokens)), tokens])
    if finite.all():
        return [Sampled(token) for token in tokens.tolist()]
    return [
        Sampled(token) if good else Sampled(0, error=_not_finite())
        for token, good in zip(tokens.tolist(), finite.tolist(), strict=True)
    ]


def _not_finite() -> NotFinite:
    return NotFinite("the model's logits are not finite")
