"""gRPC's channel arguments, set on purpose and in one place: gRPC ignores a misspelt one silently, so a test asserts each."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

__all__ = [
    "CLIENT_OPTIONS",
    "MAX_MESSAGE_BYTES",
    "connect",
    "leave",
    "server_options",
    "why_ended",
]

_FAILED_WRITE = "Internal error from Core"

# A prompt of 128 Ki tokens as packed varints is well under 1 MiB; text and log-probabilities of all prompt tokens are larger.
MAX_MESSAGE_BYTES = 64 << 20


def _keepalive(every_ms: int, answered_within_ms: int) -> list[tuple[str, int | str]]:
    """A link on which nothing comes for so long is pinged, and lost if that is not answered."""
    return [
        ("grpc.keepalive_time_ms", every_ms),
        ("grpc.keepalive_timeout_ms", answered_within_ms),
        # What decides where gRPC has both, a minute by default.
        ("grpc.http2.ping_timeout_ms", answered_within_ms),
        ("grpc.http2.max_pings_without_data", 0),
    ]


# Between services: a silent link is lost within two leases, of a handoff (3 s) and of an executor at the scheduler (2.5 s).
_WITHIN = _keepalive(2_500, 2_000)
# To clients, which may be far away, and asleep.
_PUBLIC = _keepalive(10_000, 5_000)

CLIENT_OPTIONS: list[tuple[str, int | str]] = [
    *_WITHIN,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    # However long a service was away, the others are back within half of the scheduler's `settle_seconds`.
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # Channels to one address share no connection: a stream that is stuck harms no other.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
]


def server_options(max_receive_bytes: int = MAX_MESSAGE_BYTES, *, public: bool = False) -> list[tuple[str, int | str]]:
    """Arguments of a server that takes messages of at most this size, from clients or from other services alone."""
    return [
        *(_PUBLIC if public else _WITHIN),
        ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # Two processes on one port would share its connections, and one of them would be the wrong one.
        ("grpc.so_reuseport", 0),
    ]


def connect(address: str) -> grpc.aio.Channel:
    """A channel to another service of the suite, HOST:PORT, on the mesh's trusted network."""
    return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)


def why_ended(error: grpc.aio.AioRpcError) -> str:
    """What became of a stream between services, for logs.

    A write that comes upon a stream which the other end has just ended is told by grpc.aio as a failure of its core, whatever the
    stream's own status.
    """
    if error.code() is grpc.StatusCode.INTERNAL and error.details() == _FAILED_WRITE:
        return "the stream ended while it was written to: the other end closed it, or is gone"
    return f"{error.code().name}: {error.details()}"


def leave(call: Any) -> None:
    """Cancel a stream, whatever became of it.

    A call one of whose writes has failed is done for grpc.aio, whose `cancel` then does nothing. If messages of the other side are
    unread, gRPC's core goes on to keep it, and with it a task and its connection, for ever.
    """
    call.cancel()
    call._cython_call.cancel("left")  # noqa: SLF001 - it has no other name
