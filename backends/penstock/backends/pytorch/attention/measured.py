"""The attention that a CUDA or ROCm device is quickest with, by its own clock."""

from __future__ import annotations

import torch

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.pytorch.attention.plan import Attention
from penstock.backends.pytorch.attention.selection import Trial, choose, ways_of
from penstock.backends.pytorch.timing import launched, recorded
from penstock.common.logs import logger

__all__ = ["quickest"]


def quickest(spec: DecoderSpec, dtype: torch.dtype, block_size: int, device: torch.device) -> Attention:
    """See `choose`. What was tried is logged.

    Raises:
        RuntimeError: the device computes no attention.
    """
    with torch.inference_mode():
        ways = ways_of(device, spec.sliding_window)
        attention, (decodes, prefills) = choose(spec, dtype, block_size, device, ways, recorded, launched)
    logger().info("attention chosen", device=str(device), decoding=_summaries(decodes), prefill=_summaries(prefills))
    return attention


def _summaries(trials: list[Trial]) -> list[str]:
    return [f"{t.name}: {t.reason}" if t.seconds is None else f"{t.name}: {t.seconds * 1e6:.0f} us" for t in trials]
