"""Drawing one token of a row, exactly, without sorting the vocabulary.

The kept set is transformers': the top-k tokens, of these the smallest set, likeliest first, whose probability reaches top_p, and
of these the tokens that reach min_p. Tokens as likely as the k-th are all kept; at the border of top_p the lower of equally likely
ids comes first.

Where top-k leaves few tokens they are sorted. Otherwise a token is drawn from the whole softmax, and accepted if it is in the kept
set, which the mass of the likelier tokens tells in one pass; if not, no token behind it is kept either, so they are struck out and
another is drawn. Accepted tokens are distributed as the renormalised kept set. Each row is computed alone and in one fixed order.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.executor.sampling.likeliest import at_least_kth
from penstock.executor.sampling.parameters import SamplingParameters
from penstock.executor.sampling.random import uniform

__all__ = ["FEW", "Drawer", "draw_likeliest"]

# The mass of a row is a table of so many columns: numpy adds down columns several times as fast as along rows.
_COLUMNS = 1024
FEW = 4096
"""Tokens that top-k may leave to be sorted."""

# Rejections of one token at most. A token is rejected with all behind it, so that their number is that of the records in a random
# order, about ln(vocabulary) at most, 13 for 260,000 tokens: the chance of 128 is below 1e-70, less than that of a wrong sum.
_MOST_REJECTIONS = 128


class Drawer:
    """Draws tokens from rows of one vocabulary, in buffers of its own. Not for two threads at once."""

    def __init__(self, vocabulary_size: int) -> None:
        self._size = vocabulary_size
        padded = -(-vocabulary_size // _COLUMNS) * _COLUMNS
        self._mass = np.zeros(padded, np.float32)
        self._work = np.empty(padded, np.float32)
        self._mask = np.empty(padded, np.bool_)

    def draw(self, row: NDArray[np.float32], parameters: SamplingParameters, position: int) -> int:
        """The id of a token. `row` [vocabulary] holds finite logits or -inf, at least one of them finite, and is left as it is."""
        if 0 < parameters.top_k <= FEW:
            ids = at_least_kth(row, parameters.top_k)
            return draw_likeliest(ids, row[ids], parameters, position)
        mass = self._mass[: self._size]
        np.subtract(row, row.max(), out=mass)
        if 0 < parameters.top_k < self._size:
            mass[row < np.partition(row, -parameters.top_k)[-parameters.top_k]] = -np.inf
        np.multiply(mass, np.float32(1 / parameters.temperature), out=mass)
        np.exp(mass, out=mass)
        token = self._draw_by_rejection(parameters, position)
        return int(row.argmax()) if token is None else token

    def _draw_by_rejection(self, parameters: SamplingParameters, position: int) -> int | None:
        """A token of `self._mass`, which holds each token's probability over the likeliest's; None if none is found in time."""
        mass = self._mass
        sums = _column_sums(mass)
        # The likeliest token, before which there is no mass, is kept whatever top_p is.
        nucleus = max(parameters.top_p * float(sums.sum()), 1e-300) if parameters.top_p < 1 else np.inf
        for attempt in range(_MOST_REJECTIONS):
            token = self._draw_any(sums, uniform(parameters.seed, position, attempt))
            own = mass[token]
            if own >= parameters.min_p and (nucleus == np.inf or self._mass_before(token) < nucleus):
                return token
            np.multiply(mass, np.greater_equal(mass, own, out=self._mask), out=mass)
            behind = mass[token:]
            behind[behind == own] = 0
            sums = _column_sums(mass)
            if not sums.any():
                break
        return None

    def _draw_any(self, sums: NDArray[np.float64], u: float) -> int:
        """The token at a fraction `u` of the whole mass: first its column, then its place there."""
        column, point = _find(sums, u * float(sums.sum()))
        inside = self._mass[column::_COLUMNS].astype(np.float64)
        return _find(inside, point)[0] * _COLUMNS + column

    def _mass_before(self, token: int) -> float:
        """The mass of the tokens that are likelier, or as likely with a lower id.

        The sum of max(p, own) is the mass of the likelier ones and own for each other, which is faster than adding under a mask.
        """
        mass, own, raised = self._mass, self._mass[token], self._work
        likelier = np.count_nonzero(np.greater(mass, own, out=self._mask))
        raised.fill(own)  # numpy's maximum of two arrays is several times as fast as that of an array and a number
        np.maximum(mass, raised, out=raised)
        ties = np.count_nonzero(np.equal(mass[:token], own, out=self._mask[:token]))
        return float(_column_sums(raised).sum()) - float(own) * (len(mass) - likelier - ties)


def _column_sums(values: NDArray[np.float32]) -> NDArray[np.float64]:
    sums: NDArray[np.float32] = values.reshape(-1, _COLUMNS).sum(axis=0)
    return sums.astype(np.float64)


def _find(masses: NDArray[np.float64], point: float) -> tuple[int, float]:
    """The index of the mass in which a point of the running sum lies, and how far into it. Never one of no mass."""
    ends = np.cumsum(masses)
    index = int(np.searchsorted(ends, point, side="right"))
    if index == len(ends) or not masses[index]:  # rounding led behind the last
        index = int(np.flatnonzero(masses)[-1])
    return index, point - float(ends[index - 1] if index else 0)


def draw_likeliest(ids: NDArray[np.int64], logits: NDArray[np.float32], parameters: SamplingParameters, position: int) -> int:
    """One of the tokens that top-k keeps: `ids`, rising, and their logits."""
    order = np.argsort(-logits, kind="stable")
    mass = np.exp((logits[order].astype(np.float64) - logits[order[0]]) / parameters.temperature)
    ends = np.cumsum(mass)
    kept = len(mass)
    if parameters.top_p < 1:
        kept = int(np.searchsorted(ends, parameters.top_p * ends[-1], side="left")) + 1
    if parameters.min_p > 0:
        kept = min(kept, int(np.count_nonzero(mass >= parameters.min_p)))
    kept = max(1, min(kept, int(np.count_nonzero(mass))))
    point = uniform(parameters.seed, position, 0) * ends[kept - 1]
    return int(ids[order[min(int(np.searchsorted(ends[:kept], point, side="right")), kept - 1)]])
