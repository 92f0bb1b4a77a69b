"""The attention that a CUDA or ROCm device is quickest with, by its own clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.pytorch.attention.choice import Trial, choose, ways_of
from penstock.backends.pytorch.attention.plan import Attention
from penstock.backends.pytorch.decode_graphs import CudaCapture
from penstock.common.logs import logger

__all__ = ["quickest"]

_RUNS, _ROUNDS = 10, 3


def quickest(spec: DecoderSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> Attention:
    """See `choose`. What was tried is logged.

    Raises:
        RuntimeError: the device computes no attention.
    """
    with torch.inference_mode():
        ways = ways_of(device, spec.sliding_window)
        attention, (decodes, prefills) = choose(spec, dtype, block_size, device, ways, _recorded, _launched)
    logger().info("attention chosen", device=str(device), decoding=_told(decodes), prefill=_told(prefills))
    return attention


def _launched(compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
    return compute(), _seconds(compute)


def _recorded(compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
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


def _told(trials: list[Trial]) -> list[str]:
    return [f"{t.name}: {t.reason}" if t.seconds is None else f"{t.name}: {t.seconds * 1e6:.0f} us" for t in trials]
