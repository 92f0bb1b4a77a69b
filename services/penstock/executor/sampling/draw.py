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

__all__ = ["Drawer"]

_BLOCK = 512
_FEW = 4096


class Drawer:
    """Draws tokens from rows of one vocabulary, in buffers of its own. Not for two threads at once."""

    def __init__(self, vocabulary_size: int) -> None:
        self._size = vocabulary_size
        padded = -(-vocabulary_size // _BLOCK) * _BLOCK
        self._mass = np.zeros(padded, np.float32)
        self._work = np.empty(padded, np.float32)
        self._likelier = np.empty(padded, np.bool_)

    def draw(self, row: NDArray[np.float32], parameters: SamplingParameters, position: int) -> int:
        """The id of a token. `row` [vocabulary] holds finite logits or -inf, at least one of them finite, and is left as it is."""
        if 0 < parameters.top_k <= _FEW:
            ids = at_least_kth(row, parameters.top_k)
            return int(ids[_draw_sorted(row[ids], parameters, position)])
        largest = float(row.max())
        mass = self._mass[: self._size]
        np.subtract(row, np.float32(largest), out=mass)
        if 0 < parameters.top_k < self._size:
            mass[row < np.partition(row, -parameters.top_k)[-parameters.top_k]] = -np.inf
        np.multiply(mass, np.float32(1 / parameters.temperature), out=mass)
        np.exp(mass, out=mass)
        return self._draw_by_rejection(parameters, position)

    def _draw_by_rejection(self, parameters: SamplingParameters, position: int) -> int:
        """A token of `self._mass`, which holds each token's probability over that of the likeliest."""
        mass = self._mass
        sums = _block_sums(mass)
        # The likeliest token, before which there is no mass, is kept whatever top_p is.
        nucleus = max(parameters.top_p * float(sums.sum()), 1e-300) if parameters.top_p < 1 else np.inf
        attempt = 0
        while True:
            token = self._draw_any(sums, uniform(parameters.seed, position, attempt))
            own = mass[token]
            if own >= parameters.min_p and (nucleus == np.inf or self._mass_before(token) < nucleus):
                return token
            np.putmask(mass, mass < own, 0)
            behind = mass[token:]
            behind[behind == own] = 0
            sums = _block_sums(mass)
            attempt += 1

    def _draw_any(self, sums: NDArray[np.float64], u: float) -> int:
        """The token at a fraction `u` of the whole mass: first its block, then its place there."""
        ends = np.cumsum(sums)
        point = u * ends[-1]
        block = min(int(np.searchsorted(ends, point, side="right")), int(np.flatnonzero(sums)[-1]))
        inside = self._mass[block * _BLOCK : (block + 1) * _BLOCK].astype(np.float64)
        places = np.cumsum(inside)
        if block:
            point -= ends[block - 1]
        place = min(int(np.searchsorted(places, point, side="right")), int(np.flatnonzero(inside)[-1]))
        return block * _BLOCK + place

    def _mass_before(self, token: int) -> float:
        """The mass of the tokens that are likelier, or as likely with a lower id.

        The sum of max(p, own) is the mass of the likelier ones and own for each other, which is faster than adding under a mask.
        """
        mass, own = self._mass, self._mass[token]
        others = len(mass) - np.count_nonzero(np.greater(mass, own, out=self._likelier))
        raised = float(_block_sums(np.maximum(mass, own, out=self._work)).sum())
        ties = np.count_nonzero(mass[:token] == own)
        return raised - float(own) * (others - ties)


def _block_sums(values: NDArray[np.float32]) -> NDArray[np.float64]:
    sums: NDArray[np.float32] = values.reshape(-1, _BLOCK).sum(axis=1)
    return sums.astype(np.float64)


def _draw_sorted(logits: NDArray[np.float32], parameters: SamplingParameters, position: int) -> int:
    """The index of a token among a few."""
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
    return int(order[min(int(np.searchsorted(ends[:kept], point, side="right")), kept - 1)])
