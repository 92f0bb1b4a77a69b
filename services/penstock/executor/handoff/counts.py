"""What has become of an executor's handoffs, for metrics and for what the scheduler is told."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.failing import FailingPeers
from penstock.executor.handoff.ticket import Arrival, Transport
from penstock.executor.handoff.words import Refusal

__all__ = ["HandoffCounts", "Moved", "outcome"]

_KEPT = 0.75  # of the measured speed, for every measurement behind it
# What was measured longer ago is told no more: a link that was slow once is tried again.
_REMEMBERED_SECONDS = 60.0


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
        failing: executors with which the last handoff failed.
    """

    received: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    moved: dict[Transport, Moved] = field(default_factory=dict)
    exported: Counter[Transport] = field(default_factory=Counter)
    refusals: Counter[Refusal] = field(default_factory=Counter)
    resumptions: int = 0
    receiving: int = 0
    sending: int = 0
    failing: FailingPeers = field(default_factory=FailingPeers)
    _bytes_per_second: float = 0.0
    _measured_at: float = 0.0

    def arrived(self, arrival: Arrival) -> None:
        """A sequence's KV is here."""
        moved = self.moved.setdefault(arrival.transport, Moved())
        moved.handoffs += 1
        moved.bytes += arrival.kv_bytes
        moved.seconds += arrival.transfer
        self.resumptions += arrival.resumptions

    def measured(self, speed: float, now: float) -> None:
        """KV has gone out with so many bytes per second."""
        before = self.bytes_per_second(now)
        self._bytes_per_second = _KEPT * before + (1 - _KEPT) * speed if before else speed
        self._measured_at = now

    def bytes_per_second(self, now: float) -> float:
        """Of KV that goes out from here; 0 where nothing has for some time. `now` by the event loop's clock."""
        return self._bytes_per_second if now < self._measured_at + _REMEMBERED_SECONDS else 0.0


def outcome(failure: HandoffFailure | None) -> str:
    """Of a handoff that was not done; None: the sequence ended by itself, or was aborted."""
    return "ended" if failure is None else failure.value
