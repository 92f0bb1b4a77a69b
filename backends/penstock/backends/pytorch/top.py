"""Of rows of logits on a device, what is brought to the host: what decides where that suffices, else the row."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.backends.contract import TopOutput, TopRequest
from penstock.backends.pytorch.loading import to_numpy

__all__ = ["MOST_TOP", "ToldRows", "on_host"]

MOST_TOP = 256
"""Tokens that may be asked for: more are hardly ever."""


class ToldRows:
    """Tells a step's rows of logits, and keeps them on the device until the next step, in case one is wanted whole after all."""

    def __init__(self) -> None:
        self._logits: Tensor | None = None

    def forget(self) -> None:
        """Keep nothing: a step begins, or the model is closed."""
        self._logits = None

    def tell(self, logits: Tensor, request: TopRequest) -> TopOutput:
        """What `TopLogits.step_top` tells of float32 logits [R, vocabulary].

        One more than the largest count is brought of each row: where that one is less likely than the last that counts, no other
        token is as likely as it. A row where it is not, or that holds a NaN or +inf, is told whole.
        """
        counts = request.counts
        few = np.flatnonzero(counts)
        whole = np.arange(len(counts), dtype=np.int64)
        masses = np.full((len(counts), 2), np.nan)
        if not len(few):
            return TopOutput(
                np.zeros(len(counts) + 1, np.int64), _NO_IDS, _NO_VALUES, _NO_VALUES, masses, whole, to_numpy(on_host(logits))
            )
        self._logits = logits
        wanted, size = counts[few].astype(np.int64), logits.shape[1]
        rows = logits if len(few) == len(counts) else logits.index_select(0, _tensor(few, logits))
        largest = rows.amax(1)
        rows, named = _without_named(rows, request, few)
        likeliest = rows.topk(min(int(wanted.max()) + 1, size), dim=1)
        values, ids, largest_here = (each.cpu().numpy() for each in (likeliest.values, likeliest.indices, largest))
        temperatures = request.temperatures[few]
        if temperatures.any():
            masses[few] = _log_masses(rows, likeliest.values[:, :1], np.where(temperatures > 0, temperatures, 1.0))

        least = values[np.arange(len(few)), np.minimum(wanted, values.shape[1]) - 1]
        sure = (wanted < size) & np.isfinite(largest_here) & np.isfinite(values[:, 0]) & (values[:, -1] < least)
        kept = (values >= least[:, None]) & sure[:, None]
        order = np.argsort(np.where(kept, ids, size), axis=1, kind="stable")
        kept, ids, values = (np.take_along_axis(each, order, 1) for each in (kept, ids, values))

        lengths = np.zeros(len(counts) + 1, np.int64)
        lengths[few + 1] = kept.sum(1)
        whole[few[sure]] = -1
        rest = np.flatnonzero(whole >= 0)
        whole[rest] = np.arange(len(rest))
        entire = to_numpy(on_host(logits.index_select(0, _tensor(rest, logits))))
        return TopOutput(np.cumsum(lengths), ids[kept], values[kept], named, masses, whole, entire)

    def whole(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the step that was told last.

        Raises:
            RuntimeError: another step has begun since, or the model is closed.
        """
        if self._logits is None:
            raise RuntimeError("the rows of that step are no longer there")
        return to_numpy(on_host(self._logits.index_select(0, _tensor(rows, self._logits))))


def on_host(logits: Tensor) -> Tensor:
    """The same on the CPU: from a device into pinned memory, which PyTorch keeps for the next step."""
    if logits.device.type == "cpu":
        return logits
    return torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True).copy_(logits)


_NO_IDS, _NO_VALUES = np.empty(0, np.int64), np.empty(0, np.float32)


def _without_named(rows: Tensor, request: TopRequest, few: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.float32]]:
    """Rows in which the named tokens are impossible, and the logits that these had. Of `few` alone are any named."""
    if not len(request.named):
        return rows, _NO_VALUES
    lengths = np.diff(request.named_starts)[few]
    places = (_tensor(np.repeat(np.arange(len(few)), lengths), rows), _tensor(request.named, rows))
    named: NDArray[np.float32] = rows[places].cpu().numpy()
    return rows.index_put(places, rows.new_tensor(-np.inf)), named


def _log_masses(rows: Tensor, largest: Tensor, temperatures: NDArray[np.float64]) -> NDArray[np.float64]:
    """[rows, 2]: of each row the logarithm of the sum of exp(logit), and of exp(logit / temperature)."""
    shifted, divisors = rows - largest, _tensor(temperatures, rows)[:, None]
    sums = [shifted.exp().sum(1, dtype=torch.float64), (shifted * (1 / divisors).float()).exp().sum(1, dtype=torch.float64)]
    offsets = [largest.double(), largest.double() / divisors]
    masses = [total.log() + offset[:, 0] for total, offset in zip(sums, offsets, strict=True)]
    told: NDArray[np.float64] = torch.stack(masses, dim=1).cpu().numpy()
    return told


def _tensor(values: NDArray[np.int64] | NDArray[np.float64], beside: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(beside.device)
