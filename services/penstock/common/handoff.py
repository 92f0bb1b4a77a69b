"""What executors, gateways and the scheduler say of handoffs of KV."""

from __future__ import annotations

import enum

__all__ = ["RECEIVING_SHARE", "HandoffFailure"]

# Of an executor's places and blocks, one in so many may wait for KV: it admits by that, and the scheduler places by it. Two
# executors that hand over to each other would otherwise be full of such sequences some day, each waiting for a prompt that the
# other has no room to compute.
RECEIVING_SHARE = 2


class HandoffFailure(enum.Enum):
    """Why KV was not handed over, as an executor says it. The value stands in responses and metrics."""

    LEASE_EXPIRED = "lease_expired"
    ABORTED = "aborted"
    REFUSED = "refused"
    UNKNOWN_PEER = "unknown_peer"
    BACKEND = "backend"
    INCOMPATIBLE = "incompatible"
