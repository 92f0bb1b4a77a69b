"""How large a piece of KV is best, by transport; measured by ``benchmarks/handoff.py --sizes``."""

from __future__ import annotations

from penstock.executor.handoff.ticket import Transport

__all__ = ["best"]

_MIB = 1 << 20

# Copying through memory costs no more in large pieces, and each piece costs a message and a few turns of the threads. A gRPC
# message is copied six times on its way, and a large one no longer from cache to cache.
_PUSH_BYTES = {Transport.SHARED_MEMORY: 8 * _MIB, Transport.NIXL: 8 * _MIB, Transport.GRPC: 2 * _MIB}

# gRPC keeps what is under way in both processes' memory; beyond this nothing is gained.
_INLINE_WINDOW_BYTES = 16 * _MIB


def best(transport: Transport, push_bytes: int, window_bytes: int) -> tuple[int, int]:
    """Bytes of one push, and of all that are under way, where the receiving side takes so many at most."""
    if transport is Transport.GRPC:
        window_bytes = min(window_bytes, _INLINE_WINDOW_BYTES)
    return min(push_bytes, _PUSH_BYTES[transport]), window_bytes
