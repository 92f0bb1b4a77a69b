"""From a step's logits to tokens, with their log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.executor.sampling.adjust import Adjustment
from penstock.executor.sampling.draw import FEW, HEAD, Drawer, Head, head_of
from penstock.executor.sampling.likeliest import at_least_kth, top
from penstock.executor.sampling.parameters import SamplingParameters
from penstock.executor.sampling.told import ToldRow

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
        return self.parameters.greedy and self.adjustment is None and not self.masked and self.logprobs is None

    @property
    def deciding(self) -> int:
        """How many of the likeliest tokens nearly always decide, with those as likely as the last of them, and what is `named`.

        0: more than a head.
        """
        p = self.parameters
        if p.greedy:
            return max(1, self.logprobs or 0)
        if p.top_k > FEW:
            return 0
        return max(p.top_k or HEAD, self.logprobs or 0)

    @property
    def named(self) -> NDArray[np.int64]:
        """The tokens, rising, whose logits are changed before the choice."""
        if self.adjustment is None and not self.masked:
            return _NONE
        return (self.adjustment or _UNCHANGED).touched(self.masked)

    @property
    def mass_temperature(self) -> float:
        """The temperature for which the mass of the row counts; 0: none does."""
        if not (self.parameters.greedy or self.parameters.top_k):
            return self.parameters.temperature
        return 0.0 if self.logprobs is None else 1.0


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

    def sample(self, logits: NDArray[np.float32], rows: Sequence[Row]) -> list[Sampled]:
        """One token for each row of `logits` [rows, vocabulary], which may be overwritten."""
        plain = [i for i, row in enumerate(rows) if row.plain]
        if len(plain) == len(rows):
            return _greedy(logits)
        sampled: list[Sampled | None] = [None] * len(rows)
        for i in plain:
            sampled[i] = _greedy(logits[i : i + 1])[0]
        return [done or self._sample_row(logits[i], rows[i]) for i, done in enumerate(sampled)]

    def sample_told(self, told: ToldRow, row: Row) -> Sampled | None:
        """The token that `sample` would choose from the whole row; None where what is told does not decide that.

        Args:
            told: as many of the likeliest tokens as are `Row.deciding`, and those that are `Row.named`.
            row: what is to be drawn.
        """
        changed = told.named_logits.copy()
        if row.adjustment is not None or row.masked:
            (row.adjustment or _UNCHANGED).apply(changed, row.masked, told.named)
        token = self._choose(told, changed, row)
        if token is None or row.logprobs is None:
            return None if token is None else Sampled(token)
        return self._scored(told, token, row.logprobs)

    def _choose(self, told: ToldRow, changed: NDArray[np.float32], row: Row) -> int | None:
        p = row.parameters
        ids, logits = told.together(changed)
        if p.greedy:
            return int(ids[logits.argmax()])
        if p.top_k:
            kept = at_least_kth(logits, p.top_k)
            return Head(ids[kept], logits[kept], p.temperature).draw(None, p, row.position)
        total = told.total(logits.max(), changed, p.temperature)
        likeliest = head_of(ids, logits, total, p.temperature)
        return None if likeliest is None else likeliest.draw(total, p, row.position)

    def _scored(self, told: ToldRow, token: int, count: int) -> Sampled | None:
        ids, logits = told.together(told.named_logits)
        place = int(np.searchsorted(ids, token))
        if place == len(ids) or ids[place] != token:  # some likelier ones are not known
            return None
        normalizer, likeliest = told.normalizer(), top(logits, count)
        logprob = TokenLogprob(
            logprob=float(logits[place]) - normalizer,
            rank=1 + int(np.count_nonzero(logits > logits[place])),
            top_ids=ids[likeliest].tolist(),
            top_logprobs=(logits[likeliest].astype(np.float64) - normalizer).tolist(),
        )
        return Sampled(token, logprob)

    def _sample_row(self, logits: NDArray[np.float32], row: Row) -> Sampled:
        raw = logits
        if row.adjustment is not None or row.masked:
            if row.logprobs is not None:
                raw = logits.copy()
            (row.adjustment or _UNCHANGED).apply(logits, row.masked)
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


_NONE = np.empty(0, np.int64)
_UNCHANGED = Adjustment(SamplingParameters(), (), ())


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
