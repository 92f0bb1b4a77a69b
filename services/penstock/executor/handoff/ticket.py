"""The words of a handoff: plain types that the engine, the state machines and the messages share."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["Arrival", "Receive", "Send", "Ticket", "Transport"]


class Transport(enum.Enum):
    """How payload goes over; control always goes by gRPC. The value stands in responses and metrics."""

    GRPC = "grpc"
    SHARED_MEMORY = "shared_memory"
    NIXL = "nixl"


@dataclass(frozen=True, slots=True)
class Ticket:
    """Leave to hand over the KV of one sequence, minted by the executor that decodes.

    Attributes:
        handoff_id: 16 random bytes.
        cached_tokens: tokens whose KV the decode executor has already; KV is wanted from here on.
        tokens: tokens whose KV is wanted in all.
        lease_seconds: the reservation ends when nothing is heard of it for this long.
    """

    handoff_id: bytes
    decode_executor_id: str
    prefill_executor_id: str
    cached_tokens: int
    tokens: int
    lease_seconds: float


@dataclass(frozen=True, slots=True)
class Receive:
    """A sequence whose KV comes from a prefill executor; it decodes behind the token that comes with it."""

    prefill_executor_id: str


@dataclass(frozen=True, slots=True)
class Send:
    """A sequence that is computed up to its first token here and decoded where the ticket was minted."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Arrival:
    """How a sequence's KV came over. Times in seconds.

    Attributes:
        waited: from the reservation to the first push.
        transfer: from there to the last import.
        exposed: the part of it behind the arrival of the commit, which prefill did not hide.
        resumptions: times that it was gone on with over another stream.
    """

    kv_bytes: int
    waited: float
    transfer: float
    exposed: float
    transport: Transport
    native: bool
    pushes: int
    resumptions: int = 0
