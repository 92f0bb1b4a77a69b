"""All handoffs of the executor as the side that prefills: a line to each decode executor, and what is due when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.alarm import Alarm
from penstock.executor.handoff.counts import HandoffCounts
from penstock.executor.handoff.geometry import Geometry
from penstock.executor.handoff.line import Line
from penstock.executor.handoff.ports import Handle, KvEngine
from penstock.executor.handoff.sender import Sender
from penstock.executor.handoff.ticket import Ticket

__all__ = ["Sending"]


class Sending:
    """Of one event loop; the clock is the loop's.

    Args:
        dial: keeps a stream for a line, as long as it is busy.
    """

    def __init__(
        self, executor_id: str, engine: KvEngine, geometry: Geometry, counts: HandoffCounts, dial: Callable[[Line], None]
    ) -> None:
        self._executor_id = executor_id
        self._engine = engine
        self._geometry = geometry
        self._counts = counts
        self._dial = dial
        self._loop = asyncio.get_running_loop()
        self._lines: dict[str, Line] = {}
        self._by_handle: dict[int, Sender] = {}
        self._alarm = Alarm(self._ring)

    # What the engine tells

    def begun(self, handle: Handle, ticket: Ticket) -> None:
        """A sequence has come that is to be handed over."""
        line = self._lines.get(ticket.decode_executor_id)
        if line is None:
            line = self._lines[ticket.decode_executor_id] = Line(
                ticket.decode_executor_id, self._engine, self._geometry, self._counts, self._forget
            )
        sender = Sender(ticket, handle, line, self._loop.time())
        fault = "the ticket was minted for another executor" if ticket.prefill_executor_id != self._executor_id else None
        if fault is None and not line.join(sender):
            fault = "the ticket is in use"
        if fault is not None:
            self._counts.sent[HandoffFailure.REFUSED.value] += 1
            self._engine.fail(handle, HandoffFailure.REFUSED, fault)
            return
        self._counts.sending += 1
        self._by_handle[id(handle)] = sender
        self._dial(line)
        self._alarm.by(self._loop.time() + ticket.lease_seconds / 3)

    def computed(self, handle: Handle, tokens: int) -> None:
        """KV of its first tokens is there."""
        if (sender := self._by_handle.get(id(handle))) is not None:
            sender.computed(tokens)

    def drawn(self, handle: Handle, token: int) -> None:
        """So is its first token."""
        if (sender := self._by_handle.get(id(handle))) is not None:
            sender.drawn(token, self._loop.time())

    def ended(self, handle: Handle) -> None:
        """The sequence is gone."""
        if (sender := self._by_handle.pop(id(handle), None)) is not None:
            sender.sequence_ended()

    def _ring(self) -> float | None:
        now = self._loop.time()
        for line in self._lines.values():
            for sender in line.senders:
                if sender.lease_ends <= now:
                    sender.lease_expired(*line.why)
                elif sender.answer_due is not None and sender.answer_due <= now:
                    sender.overdue(now)
            line.renew(now)
        self._forget()
        return min(filter(None, (line.due(now) for line in self._lines.values())), default=None)

    def _forget(self) -> None:
        self._by_handle = {key: sender for key, sender in self._by_handle.items() if sender.live}
        self._lines = {key: line for key, line in self._lines.items() if not line.done}

    def close(self) -> None:
        """Nothing is told any more."""
        self._alarm.stop()
        for line in self._lines.values():
            line.close()
