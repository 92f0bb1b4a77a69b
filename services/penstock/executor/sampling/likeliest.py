"""The likeliest tokens of a row, without sorting the vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["at_least_kth", "top"]

_COLUMNS = 512


def at_least_kth(row: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids, rising, of all tokens whose logit is at least the k-th largest: k of them, and more where logits are equal.

    The k-th largest of the maxima of many columns is no larger than the k-th largest logit, so that what lies below it is left out
    in one pass, and only the rest is partitioned.
    """
    if k >= len(row):
        return np.arange(len(row))
    whole = len(row) - len(row) % _COLUMNS
    if whole and k * 2 <= _COLUMNS:
        maxima = row[:whole].reshape(-1, _COLUMNS).max(axis=0)
        candidates = np.flatnonzero(row >= np.partition(maxima, -k)[-k])
    else:
        candidates = np.arange(len(row))
    values = row[candidates]
    kept: NDArray[np.int64] = candidates[values >= np.partition(values, -k)[-k]]
    return kept


def top(row: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """Ids of the n largest logits, largest first, lower ids first among equals."""
    if n == 0:
        return np.empty(0, np.int64)
    ids = at_least_kth(row, n)
    return ids[np.argsort(-row[ids], kind="stable")][:n]
