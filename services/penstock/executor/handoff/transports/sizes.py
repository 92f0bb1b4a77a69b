"""How large a piece of KV is best, by transport; measured by ``benchmarks/handoff.py --push-mib``."""

from __future__ import annotations

from penstock.common.channel import MAX_MESSAGE_BYTES
from penstock.executor.handoff.ticket import Transport

__all__ = ["PUSH_BYTES", "best", "fits"]

_MIB = 1 << 20

# Each piece costs a message and a few turns of the threads, as much processor time as copying some MiB. A gRPC message is copied
# six times on its way, and beyond 4 MiB no longer from cache to cache. gRPC's own windows and sizes of frames make no difference:
# they are left at their defaults, by which it measures the connection.
PUSH_BYTES = {Transport.SHARED_MEMORY: 16 * _MIB, Transport.NIXL: 16 * _MIB, Transport.GRPC: 4 * _MIB}

# gRPC keeps what is under way in both processes' memory; beyond this nothing is gained.
_INLINE_WINDOW_BYTES = 16 * _MIB


def best(transport: Transport, push_bytes: int, window_bytes: int) -> tuple[int, int]:
    """Bytes of one push, and of all that are under way, where the receiving side takes so many at most."""
    if transport is Transport.GRPC:
        window_bytes = min(window_bytes, _INLINE_WINDOW_BYTES)
    return min(push_bytes, PUSH_BYTES[transport]), window_bytes


def fits(transport: Transport, payload_bytes: int) -> bool:
    """Whether so much can go over in one piece: what else is in a gRPC message has a MiB."""
    return transport is not Transport.GRPC or payload_bytes <= MAX_MESSAGE_BYTES - _MIB
