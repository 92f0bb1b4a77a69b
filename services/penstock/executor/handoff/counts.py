"""What has become of an executor's handoffs, for metrics and for what the scheduler is told."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from penstock.executor.handoff.ticket import Arrival, HandoffFailure, Transport
from penstock.executor.handoff.words import Refusal

__all__ = ["HandoffCounts", "Moved", "outcome"]

# Less KV tells how long a message takes on its way, and not how much goes through.
_LEAST_BYTES = 1 << 20
_KEPT = 0.75  # of the measured speed, for every handoff that is measured behind it


@dataclass(slots=True)
class Moved:
    """KV that has arrived by one transport: payload, and the time from first pushes to last imports."""

    handoffs: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class HandoffCounts:
    """Counts since the executor's start. Written in the event loop, read by any thread.

    Attributes:
        received: ended on this side as the one that decodes, by outcome: "done", "ended", or a `HandoffFailure`'s value.
        sent: the same, as the one that prefills.
        moved: KV that came, by transport.
        exported: payload that was pushed, pushes that were repeated included.
        refusals: messages that were not obeyed here, by reason.
        resumptions: handoffs that were gone on with after a loss, each time.
        receiving: live ones, as the side that decodes.
        sending: and that prefills.
    """

    received: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    moved: dict[Transport, Moved] = field(default_factory=dict)
    exported: Counter[Transport] = field(default_factory=Counter)
    refusals: Counter[Refusal] = field(default_factory=Counter)
    resumptions: int = 0
    receiving: int = 0
    sending: int = 0
    bytes_per_second: float = 0.0

    def arrived(self, arrival: Arrival) -> None:
        """A sequence's KV is here."""
        moved = self.moved.setdefault(arrival.transport, Moved())
        moved.handoffs += 1
        moved.bytes += arrival.kv_bytes
        moved.seconds += arrival.transfer
        self.resumptions += arrival.resumptions
        if arrival.kv_bytes >= _LEAST_BYTES and arrival.exposed > 0:
            self._measure(arrival.kv_bytes / max(arrival.exposed, 1e-6))

    def _measure(self, speed: float) -> None:
        """What prefill hides costs nothing, so it is the exposed time that counts."""
        self.bytes_per_second = speed if not self.bytes_per_second else _KEPT * self.bytes_per_second + (1 - _KEPT) * speed


def outcome(failure: HandoffFailure | None) -> str:
    """Of a handoff that was not done; None: the sequence ended by itself, or was aborted."""
    return "ended" if failure is None else failure.value
