"""With which executors handoffs have failed lately, as the scheduler is told."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.common.handoff import HandoffFailure

__all__ = ["Failing", "FailingPeers"]

# What tells of the two executors and what lies between them, and not of one sequence or of one backend.
_OF_THE_PAIR = frozenset({HandoffFailure.LEASE_EXPIRED, HandoffFailure.UNKNOWN_PEER, HandoffFailure.INCOMPATIBLE})
# An executor that was not tried for so long is told of no more.
_REMEMBERED_SECONDS = 120.0


@dataclass(slots=True)
class Failing:
    """Another executor.

    Attributes:
        sends: whether KV was to go there; else it was to come from there.
        failures: in a row, up to now.
        last_at: by the event loop's clock.
    """

    executor_id: str
    sends: bool
    failures: int = 0
    last_at: float = 0.0


class FailingPeers:
    """Of one executor, both ways. Of one event loop."""

    def __init__(self) -> None:
        self._failing: dict[tuple[str, bool], Failing] = {}

    def done(self, executor_id: str, *, sends: bool) -> None:
        """A handoff has succeeded."""
        self._failing.pop((executor_id, sends), None)

    def failed(self, executor_id: str, failure: HandoffFailure | None, now: float, *, sends: bool) -> None:
        """One has not; `failure` is None where the sequence ended by itself."""
        if failure not in _OF_THE_PAIR:
            return
        found = self._failing.setdefault((executor_id, sends), Failing(executor_id, sends))
        found.failures += 1
        found.last_at = now

    def lately(self, now: float) -> list[Failing]:
        """All with which the last handoff failed."""
        self._failing = {key: peer for key, peer in self._failing.items() if now < peer.last_at + _REMEMBERED_SECONDS}
        return list(self._failing.values())
