"""How the plug-in is set up for each dtype."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from penstock.backends.contract import DeviceConfig, DType

__all__ = ["properties"]


def properties(config: DeviceConfig, dtype: DType, has_bf16: bool) -> Mapping[str, Any]:
    """Properties to compile with.

    Args:
        config: what the operator asks.
        dtype: of the weights.
        has_bf16: whether the processor multiplies bfloat16.
    """
    reduced = has_bf16 and dtype is not DType.F32
    compute = "bf16" if reduced else "f32"
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": config.threads or len(os.sched_getaffinity(0)),
        "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": compute,
        "KV_CACHE_PRECISION": compute,
    }
