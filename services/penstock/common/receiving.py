"""How much of an executor may wait for KV: the executor admits by it, and the scheduler places by it."""

from __future__ import annotations

__all__ = ["RECEIVING_SHARE"]

# One in so many places and blocks. Two executors that hand over to each other would otherwise be full of such sequences some day,
# each waiting for a prompt that the other has no room to compute.
RECEIVING_SHARE = 2
