"""How long a CUDA or ROCm device takes for something, so that of several ways the quickest can be taken."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.backends.pytorch.decode_graphs import CudaCapture

__all__ = ["Timed", "launched", "recorded"]

Timed = Callable[[Callable[[], Tensor]], tuple[Tensor, float]]
"""What a computation gives, and the seconds that it takes once it has run before."""

_RUNS, _ROUNDS = 10, 3


def launched(compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """As `Timed`, of what is launched anew each time."""
    return compute(), _seconds(compute)


def recorded(compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """As `Timed`, of what is recorded once and replayed, as steps of decoding are."""
    replay = CudaCapture()(compute)
    return replay().clone(), _seconds(replay)


def _seconds(compute: Callable[[], Tensor]) -> float:
    """The quickest of a few rounds, for one run. By the host's clock, since what it takes to launch counts too."""
    rounds = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(_RUNS):
            compute()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - began) / _RUNS)
    return min(rounds)
