"""Of rows of logits on a device, what is brought to the host: the likeliest tokens where they suffice, else the row."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.backends.contract import TopOutput
from penstock.backends.pytorch.loading import to_numpy

__all__ = ["MOST_TOP", "on_host", "top_of"]

MOST_TOP = 256
"""Tokens that may be asked for: more are hardly ever."""


def top_of(logits: Tensor, counts: NDArray[np.int32]) -> TopOutput:
    """What `TopLogits.step_top` tells of float32 logits [R, vocabulary].

    One more than the largest count is brought of each row: where that one is less likely than the last that counts, no other token
    is as likely as it. A row where it is not, or that holds a NaN or +inf, is told whole.
    """
    few = np.flatnonzero(counts)
    whole = np.arange(len(counts), dtype=np.int64)
    if not len(few):
        return TopOutput(np.zeros(len(counts) + 1, np.int64), _NO_IDS, _NO_VALUES, whole, to_numpy(on_host(logits)))
    wanted, size = counts[few].astype(np.int64), logits.shape[1]
    rows = logits if len(few) == len(counts) else logits.index_select(0, _index(few, logits))
    likeliest = rows.topk(min(int(wanted.max()) + 1, size), dim=1)
    values, ids, largest = (each.cpu().numpy() for each in (likeliest.values, likeliest.indices, rows.amax(1)))
    least = values[np.arange(len(few)), np.minimum(wanted, values.shape[1]) - 1]
    sure = (wanted < size) & np.isfinite(largest) & (values[:, -1] < least)
    kept = (values >= least[:, None]) & sure[:, None]
    order = np.argsort(np.where(kept, ids, size), axis=1, kind="stable")
    kept, ids, values = (np.take_along_axis(each, order, 1) for each in (kept, ids, values))

    lengths = np.zeros(len(counts) + 1, np.int64)
    lengths[few + 1] = kept.sum(1)
    whole[few[sure]] = -1
    rest = np.flatnonzero(whole >= 0)
    whole[rest] = np.arange(len(rest))
    entire = to_numpy(on_host(logits.index_select(0, _index(rest, logits))))
    return TopOutput(np.cumsum(lengths), ids[kept], values[kept], whole, entire)


def on_host(logits: Tensor) -> Tensor:
    """The same on the CPU: from a device into pinned memory, which PyTorch keeps for the next step."""
    if logits.device.type == "cpu":
        return logits
    return torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True).copy_(logits)


_NO_IDS, _NO_VALUES = np.empty(0, np.int64), np.empty(0, np.float32)


def _index(rows: NDArray[np.int64], beside: Tensor) -> Tensor:
    return torch.from_numpy(rows).to(beside.device)
