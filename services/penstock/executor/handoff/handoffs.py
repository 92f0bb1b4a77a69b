"""The handoffs of one executor, both ways: what the engine tells in its thread is done in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from penstock.common import faults
from penstock.executor.handoff.counts import HandoffCounts
from penstock.executor.handoff.geometry import Geometry
from penstock.executor.handoff.line import Line
from penstock.executor.handoff.ports import Handle, KvEngine
from penstock.executor.handoff.receiving import Receiving, mint
from penstock.executor.handoff.sending import Sending
from penstock.executor.handoff.ticket import Receive, Send, Ticket, Transport

__all__ = ["Handoffs", "Settings"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How handoffs run.

    Attributes:
        lease_seconds: a handoff ends when nothing is heard of its other side for this long.
        push_bytes: of KV that one push holds at most, unless one block is more.
        window_bytes: that are under way at most on one stream, unless one block or token is more.
        transports: that it may go by.
    """

    lease_seconds: float
    push_bytes: int
    window_bytes: int
    transports: tuple[Transport, ...]


class Handoffs:
    """`HandoffEvents` of an engine. Made in the event loop that the streams run in.

    Args:
        executor_id: this executor's.
        dial: keeps a stream to a decode executor while its line is busy.
    """

    def __init__(
        self, executor_id: str, engine: KvEngine, geometry: Geometry, settings: Settings, dial: Callable[[Line], None]
    ) -> None:
        self.counts = HandoffCounts()
        self.settings = settings
        self.receiving = Receiving(engine, geometry, self.counts)
        self.sending = Sending(executor_id, engine, geometry, self.counts, dial)
        self._executor_id = executor_id
        self._loop = asyncio.get_running_loop()

    def reserved(self, handle: Handle, cached_tokens: int, tokens: int) -> Ticket:
        """See `HandoffEvents`."""
        faults.reach("executor.reserved")
        receive = cast("Receive", handle.request.handoff)
        ticket = mint(self._executor_id, receive, cached_tokens, tokens, self.settings.lease_seconds)
        self._call(lambda: self.receiving.reserved(ticket, handle))
        return ticket

    def begun(self, handle: Handle) -> None:
        """See `HandoffEvents`."""
        send = cast("Send", handle.request.handoff)
        self._call(lambda: self.sending.begun(handle, send.ticket))

    def computed(self, handle: Handle, tokens: int) -> None:
        """See `HandoffEvents`."""
        self._call(lambda: self.sending.computed(handle, tokens))

    def drawn(self, handle: Handle, token: int) -> None:
        """See `HandoffEvents`."""
        faults.reach("executor.drawn")
        self._call(lambda: self.sending.drawn(handle, token))

    def ended(self, handle: Handle) -> None:
        """See `HandoffEvents`."""
        side = self.sending if isinstance(handle.request.handoff, Send) else self.receiving
        self._call(lambda: side.ended(handle))

    def _call(self, what: Callable[[], None]) -> None:
        """In order: the loop keeps that of the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(what)

    def close(self) -> None:
        """Nothing is told to the engine any more."""
        self.sending.close()
        self.receiving.close()
