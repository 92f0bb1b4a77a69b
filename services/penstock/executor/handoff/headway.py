"""Whether a handoff gets on, on the side that prefills."""

from __future__ import annotations

from penstock.common.handoff import HandoffFailure

__all__ = ["Headway"]

# Refusals come as fast as messages go, each for payload that is copied out again: so often at most without headway between.
_MOST_REFUSALS = 6


class Headway:
    """What is asked for, lost or refused, until more is there than ever before; times in monotonic seconds.

    Where no answer came in time or the stream was lost, it is headway as well that all that was pushed is there: an engine amid a
    long step takes nothing and loses nothing. An engine that never ends its step is found by its executor's own watchdog.

    Args:
        lease_seconds: that may pass without headway, though the other side answers.
    """

    def __init__(self, lease_seconds: float) -> None:
        self._lease = lease_seconds
        self._furthest = 0
        self._refusals = 0
        self._waits = False  # whether the last trouble was an answer that was late, or a stream that was lost
        self._stuck_since: float | None = None

    def waits(self, since: float) -> None:
        """Something that was asked or sent at that time is unanswered, or lost with its stream."""
        self._waits = True
        self._note(since)

    def refused(self, now: float) -> None:
        """What was sent was not obeyed."""
        self._waits = False
        self._refusals += 1
        self._note(now)

    def _note(self, since: float) -> None:
        if self._stuck_since is None:
            self._stuck_since = since

    def reserved(self, first_token: int, pushed: int) -> None:
        """The other side has KV before `first_token`, where it was pushed before `pushed`."""
        if first_token > self._furthest or (self._waits and first_token >= pushed):
            self._furthest = max(first_token, self._furthest)
            self.made()

    def made(self) -> None:
        """Something was imported."""
        self._refusals = 0
        self._stuck_since = None

    def out(self, now: float) -> tuple[HandoffFailure, str] | None:
        """Why to give up, if it is time to."""
        if self._refusals > _MOST_REFUSALS:
            return HandoffFailure.REFUSED, "the other side answers, but takes nothing"
        if self._stuck_since is None or now < self._stuck_since + self._lease:
            return None
        failure = HandoffFailure.LEASE_EXPIRED if self._waits else HandoffFailure.REFUSED
        return failure, f"the other side answers, but took nothing for {self._lease:g} s"
