"""When a handoff's KV came, as it is reported."""

from __future__ import annotations

from penstock.executor.handoff.ticket import Arrival, Transport

__all__ = ["ArrivalClock"]


class ArrivalClock:
    """Notes what happens to a handoff on the side that decodes; times in monotonic seconds."""

    def __init__(self, reserved_at: float) -> None:
        self.resumptions = 0
        self._reserved_at = reserved_at
        self._first_push_at: float | None = None
        self._committed_at = reserved_at
        self._bytes = 0
        self._pushes = 0
        self._transport = Transport.GRPC
        self._native = False

    def pushed(self, now: float) -> None:
        """A push has come."""
        if self._first_push_at is None:
            self._first_push_at = now

    def imported(self, size: int, transport: Transport, *, native: bool) -> None:
        """Its bytes stand in the blocks."""
        self._bytes += size
        self._pushes += 1
        self._transport, self._native = transport, native

    def committed(self, now: float) -> None:
        """The first token has come."""
        self._committed_at = now

    def arrival(self, now: float) -> Arrival:
        """Everything stands in the blocks."""
        first = self._committed_at if self._first_push_at is None else self._first_push_at
        return Arrival(
            kv_bytes=self._bytes,
            waited=first - self._reserved_at,
            transfer=now - first,
            exposed=now - self._committed_at,
            transport=self._transport,
            native=self._native,
            pushes=self._pushes,
            resumptions=self.resumptions,
        )
