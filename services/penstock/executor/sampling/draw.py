"""Drawing one token of a row, exactly, without sorting the vocabulary.

The kept set is transformers': the top-k tokens, of these the smallest set, likeliest first, whose probability reaches top_p, and
of these the tokens that reach min_p. Tokens as likely as the k-th are all kept; at the border of top_p the lower of equally likely
ids comes first.

The tokens stand in one order: the head, which is the few hundred likeliest, sorted, and behind it the others as they lie in
memory. Where the kept set ends within the head, a token is drawn from it as it is. Otherwise one is drawn from the whole softmax: a
token of the head is kept; another is accepted if it is in the kept set, which the mass of the likelier tokens tells in one pass; if
not, no token behind it is kept either, so they are struck out and another is drawn. Accepted tokens are distributed as the
renormalised kept set. Each row is computed alone and in one fixed order.

So the head and the mass of the row are mostly all that counts, and a row may stay where it was computed (`Head.draw`). A row whose
mass is spread so wide that its head has little of it has none: sorting that would be in vain.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.executor.sampling.likeliest import at_least_kth
from penstock.executor.sampling.parameters import SamplingParameters
from penstock.executor.sampling.random import uniform

__all__ = ["FEW", "HEAD", "Drawer", "Head", "head_of"]

HEAD = 256
"""Tokens of a head; more where some are as likely as the last."""
FEW = 4096
"""Tokens that top-k may leave to be sorted."""

# More tokens as likely as the head's last one are not sorted.
_LONGEST_HEAD = 2 * HEAD
# The mass of a row, over its likeliest token's: above this a head would seldom decide.
_FLAT = 64.0
# The mass of a row is a table of so many columns: numpy adds down columns several times as fast as along rows.
_COLUMNS = 1024

# Rejections of one token at most. A token is rejected with all behind it, so that their number is that of the records in a random
# order, about ln(vocabulary) at most, 13 for 260,000 tokens: the chance of 128 is below 1e-70, less than that of a wrong sum.
_MOST_REJECTIONS = 128


class Head:
    """A row's likeliest tokens.

    Args:
        ids: rising, of all tokens whose logit is at least that of the last of them.
        logits: of these, the largest finite.
        temperature: by which masses are computed, each over the likeliest token's.

    Attributes:
        ids: the likeliest first, lower ones first among equals.
        mass: of all of them together.
    """

    def __init__(self, ids: NDArray[np.int64], logits: NDArray[np.float32], temperature: float) -> None:
        order = np.argsort(-logits, kind="stable")
        self.ids = ids[order]
        self._masses = np.exp((logits[order].astype(np.float64) - logits[order[0]]) / temperature)
        self._ends = np.cumsum(self._masses)
        self.mass = float(self._ends[-1])

    def draw(self, total: float | None, parameters: SamplingParameters, position: int) -> int | None:
        """The token, where the head decides it; None where it is one of the others, or may be.

        Args:
            total: the mass of all tokens of the row; None: there are no others.
            parameters: what is kept.
            position: of the token in the output.
        """
        kept = self._kept(total, parameters)
        if kept or total is None:
            return self.at(uniform(parameters.seed, position, 0) * float(self._ends[kept - 1]), kept or None)
        point = uniform(parameters.seed, position, 1) * total
        return self.at(point) if point < self.mass else None

    def at(self, point: float, kept: int | None = None) -> int:
        """The token at a point of the running sum of masses, one of the first `kept`."""
        ends = self._ends[:kept]
        return int(self.ids[min(int(np.searchsorted(ends, point, side="right")), len(ends) - 1)])

    def _kept(self, total: float | None, parameters: SamplingParameters) -> int:
        """How many tokens are kept; 0: all, and others perhaps."""
        likely_enough = self._masses[self._masses > 0] >= parameters.min_p
        kept = min(len(self.ids), int(np.count_nonzero(likely_enough)))
        nucleus = parameters.top_p * (self.mass if total is None else total)
        if parameters.top_p < 1 and nucleus <= self.mass:
            kept = min(kept, int(np.searchsorted(self._ends, nucleus, side="left")) + 1)
        return kept if kept < len(self.ids) else 0


def head_of(ids: NDArray[np.int64], logits: NDArray[np.float32], total: float, temperature: float) -> Head | None:
    """The head of a row, from all tokens that are likely enough, `HEAD` at least; None: it has none.

    Args:
        ids: rising, of all tokens whose logit is at least that of the last of them.
        logits: of these, the largest finite.
        total: the mass of all tokens of the row, over the likeliest's.
        temperature: by which that is computed.
    """
    if not total <= _FLAT:
        return None
    if len(ids) > HEAD:
        likeliest = at_least_kth(logits, HEAD)
        ids, logits = ids[likeliest], logits[likeliest]
    return Head(ids, logits, temperature) if len(ids) <= _LONGEST_HEAD else None


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
        token: int | None
        if 0 < parameters.top_k <= FEW:
            ids = at_least_kth(row, parameters.top_k)
            head = Head(ids, row[ids], parameters.temperature)
            token = head.draw(None, parameters, position)
        else:
            token = self._draw_any(row, parameters, position)
        return int(row.argmax()) if token is None else token

    def _draw_any(self, row: NDArray[np.float32], parameters: SamplingParameters, position: int) -> int | None:
        mass = self._mass[: self._size]
        np.subtract(row, row.max(), out=mass)
        if 0 < parameters.top_k < self._size:
            mass[row < np.partition(row, -parameters.top_k)[-parameters.top_k]] = -np.inf
        if parameters.temperature != 1:
            np.multiply(mass, np.float32(1 / parameters.temperature), out=mass)
        np.exp(mass, out=mass)
        sums = _column_sums(self._mass)
        total = float(sums.sum())
        head = None
        if total <= _FLAT:
            ids = at_least_kth(row, HEAD)
            head = head_of(ids, row[ids], total, parameters.temperature)
        if head is None:
            return self._draw_by_rejection(None, sums, parameters, position)
        token = head.draw(total, parameters, position)
        if token is None:
            mass[head.ids] = 0
            token = self._draw_by_rejection(head, _column_sums(self._mass), parameters, position)
        return token

    def _draw_by_rejection(
        self, head: Head | None, sums: NDArray[np.float64], parameters: SamplingParameters, position: int
    ) -> int | None:
        """A token of the head, all of which are kept, or of `self._mass`, which holds the others'; None if none is found in time.

        Args:
            head: of the row, if it has one.
            sums: of the columns of the others' masses.
            parameters: what is kept.
            position: of the token in the output.
        """
        before = head.mass if head else 0.0
        # The likeliest token, before which there is no mass, is kept whatever top_p is.
        nucleus = max(parameters.top_p * (before + float(sums.sum())), 1e-300) if parameters.top_p < 1 else np.inf
        for attempt in range(1, _MOST_REJECTIONS):
            point = uniform(parameters.seed, position, attempt) * (before + float(sums.sum()))
            if head and (point < before or not sums.any()):
                return head.at(point)
            token = self._at(sums, point - before)
            own = self._mass[token]
            if own >= parameters.min_p and (nucleus == np.inf or before + self._mass_before(token) < nucleus):
                return token
            self._strike_out(token)
            sums = _column_sums(self._mass)
            if not (head or sums.any()):
                break
        return None

    def _at(self, sums: NDArray[np.float64], point: float) -> int:
        """The token at a point of the whole mass: first its column, then its place there."""
        column, inside = _find(sums, point)
        return _find(self._mass[column::_COLUMNS].astype(np.float64), inside)[0] * _COLUMNS + column

    def _strike_out(self, token: int) -> None:
        """Leave no mass to a token and those behind it: less likely, or as likely with a higher id."""
        mass, own = self._mass, self._mass[token]
        np.multiply(mass, np.greater_equal(mass, own, out=self._mask), out=mass)
        behind = mass[token:]
        behind[behind == own] = 0

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
