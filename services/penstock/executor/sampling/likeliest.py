"""The likeliest tokens of a row, without sorting the vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["at_least_kth", "top"]

_COLUMNS = 4096
# More columns than a fraction of them are not looked through one by one.
_MOST = _COLUMNS // 8


def at_least_kth(row: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids, rising, of all tokens whose logit is at least the k-th largest: k of them, and more where logits are equal.

    The k-th largest of the maxima of many columns is no larger than the k-th largest logit, so that columns with a smaller maximum
    are left out after one pass, and only the rest is partitioned.
    """
    if k >= len(row):
        return np.arange(len(row))
    candidates = _candidates(row, k) if k <= _MOST and len(row) >= _COLUMNS else np.arange(len(row))
    values = row[candidates]
    kept: NDArray[np.int64] = candidates[values >= np.partition(values, -k)[-k]]
    return kept


def _candidates(row: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Ids, rising: those of the k likeliest tokens, and some others."""
    whole = len(row) - len(row) % _COLUMNS
    table = row[:whole].reshape(-1, _COLUMNS)
    maxima = table.max(axis=0)
    bound = np.partition(maxima, -k)[-k]
    columns = np.flatnonzero(maxima >= bound)
    rows, places = np.divmod(np.flatnonzero(table.take(columns, axis=1) >= bound), len(columns))
    return np.concatenate((rows * _COLUMNS + columns[places], whole + np.flatnonzero(row[whole:] >= bound)))


def top(row: NDArray[np.float32], n: int) -> NDArray[np.int64]:
    """Ids of the n largest logits, largest first, lower ids first among equals."""
    if n == 0:
        return np.empty(0, np.int64)
    ids = at_least_kth(row, n)
    return ids[np.argsort(-row[ids], kind="stable")][:n]
