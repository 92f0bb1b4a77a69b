"""The prefill side of one handoff, from the ticket that the gateway brought to the Ack.

What happens to it is an `Event`; what an event does in a state stands in one table at the end, and nowhere else. KV stays in the
sequence's blocks until the Ack, so whatever was lost on the way is copied out again, under a new epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from penstock.common.handoff import HandoffFailure
from penstock.common.tables import by_state
from penstock.executor.handoff.chunk_queue import ChunkQueue
from penstock.executor.handoff.headway import Headway
from penstock.executor.handoff.sender_states import NO_STREAM, Cut, Event, OutgoingChunk, SenderPorts, State
from penstock.executor.handoff.ticket import Ticket
from penstock.executor.handoff.words import (
    Abort,
    Ack,
    Ask,
    Commit,
    Push,
    Pushed,
    Refusal,
    Refused,
    Release,
    Reserve,
    Reserved,
)

__all__ = ["TABLE", "Sender"]

_RETRIED = frozenset({Refusal.STALE_EPOCH, Refusal.OUT_OF_RANGE, Refusal.WRONG_CHECKSUM, Refusal.INCOMPLETE, Refusal.UNPROVEN})


_Row = tuple[Callable[..., None], ...]


class Sender:
    """One handoff. Every public method is an event, or a fact; `now` is in monotonic seconds.

    It fails when nothing is heard for a lease, or there was no `Headway` for one.

    Attributes:
        lease_ends: unless something is heard before.
        answer_due: when an answer that is awaited is late; None: none is.
        said_at: when something was sent last.
    """

    def __init__(self, ticket: Ticket, handle: Any, ports: SenderPorts, now: float) -> None:
        self.ticket = ticket
        self.handle = handle
        self.state = State.OPENING
        self.epoch = 0
        self.failure: HandoffFailure | None = None
        self.lease_ends = now + ticket.lease_seconds
        self.answer_due: float | None = None
        self.said_at = now
        self._ports = ports
        self._chunks = ChunkQueue(ticket.tokens)
        self._token: int | None = None
        self._committed = False
        self._headway = Headway(ticket.lease_seconds)

    @property
    def live(self) -> bool:
        """Whether the sequence is still held for it."""
        return self.state not in {State.DONE, State.FAILED}

    def heard(self, now: float) -> None:
        """The other side has said something about it."""
        self.lease_ends = now + self.ticket.lease_seconds

    # What happens

    def computed(self, tokens: int) -> None:
        self._apply(Event.COMPUTED, tokens)

    def drawn(self, token: int, now: float) -> None:
        self._apply(Event.DRAWN, token, now)

    def room(self) -> None:
        self._apply(Event.ROOM)

    def exported(self, chunk: OutgoingChunk, now: float) -> None:
        self._apply(Event.EXPORTED, chunk, now)

    def export_failed(self, chunk: OutgoingChunk, failure: HandoffFailure, message: str) -> None:
        self._apply(Event.EXPORT_FAILED, chunk, failure, message)

    def stream_up(self, cut: Cut, now: float) -> None:
        self._apply(Event.STREAM_UP, cut, now)

    def stream_lost(self, now: float) -> None:
        self._apply(Event.STREAM_LOST, now)

    def reserved(self, reserved: Reserved, now: float) -> None:
        self._apply(Event.RESERVED, reserved, now)

    def pushed(self, pushed: Pushed, now: float) -> None:
        self._apply(Event.PUSHED, pushed, now)

    def ack(self, ack: Ack) -> None:
        self._apply(Event.ACK, ack)

    def refused(self, refused: Refused, now: float) -> None:
        self._apply(Event.REFUSED, refused, now)

    def aborted(self) -> None:
        self._apply(Event.ABORTED)

    def overdue(self, now: float) -> None:
        self._apply(Event.OVERDUE, now)

    def lease_expired(self, failure: HandoffFailure, message: str) -> None:
        self._apply(Event.LEASE_EXPIRED, failure, message)

    def unreachable(self, failure: HandoffFailure, message: str) -> None:
        self._apply(Event.UNREACHABLE, failure, message)

    def sequence_ended(self) -> None:
        self._apply(Event.SEQUENCE_ENDED)

    # What is done about it

    def _apply(self, event: Event, *facts: Any) -> None:
        TABLE[self.state, event](self, *facts)

    def _note_computed(self, tokens: int) -> None:
        self._chunks.computed(tokens)

    def _push_computed(self, tokens: int) -> None:
        self._note_computed(tokens)
        self._want_room()

    def _note_drawn(self, token: int, _now: float) -> None:
        self._note_computed(self.ticket.tokens)
        self._token = token

    def _push_rest(self, token: int, now: float) -> None:
        self._note_drawn(token, now)
        self._advance(now)

    def _advance(self, now: float) -> None:
        """Ask for what can go now, or commit if all has gone."""
        if not self._chunks.all_cut:
            self._want_room()
        elif self._token is not None and self._chunks.all_pushed:
            self.state = State.COMMITTING
            self._committed = True
            self._say(Commit(self.ticket.handoff_id, self.epoch, self.ticket.tokens, self._token), now)

    def _want_room(self) -> None:
        if self._chunks.next_tokens():
            self._ports.want_room(self)

    def _export(self) -> None:
        chunk = self._chunks.cut_next()
        if chunk is not None:
            self._ports.export(self, chunk)
            self._want_room()

    def _push(self, chunk: OutgoingChunk, now: float) -> None:
        """In order, whichever was copied out first."""
        if chunk not in self._chunks:
            self._ports.drop(self, chunk)
            return
        for ready, parcel in self._chunks.push_ready():
            dtype = "" if ready.native else self._chunks.cut.dtype
            self._note_said(now)
            push = Push(self.ticket.handoff_id, self.epoch, ready.tokens, ready.native, dtype, parcel)
            self._ports.push(self, ready, push)
        self._advance(now)

    def _reserve(self, cut: Cut, now: float) -> None:
        self._chunks.cut = cut
        self._say(Reserve(self.ticket), now)

    def _reserve_anew(self, cut: Cut, now: float) -> None:
        self._go_back()
        self._reserve(cut, now)

    def _change_stream(self, cut: Cut, now: float) -> None:
        self._lose_stream(now)
        self._reserve(cut, now)

    def _go_back(self) -> None:
        """To before the Reserved."""
        self.state = State.OPENING
        self._drop_chunks()
        self.answer_due = None

    def _lose_stream(self, now: float) -> None:
        self._go_back()
        self._chunks.cut = NO_STREAM
        self._headway.waits(now)

    def _drop_chunks(self) -> None:
        for chunk in self._chunks.take_all():
            self._ports.drop(self, chunk)

    def _begin_epoch(self, reserved: Reserved, now: float) -> None:
        """The other side's word for what is there. A Reserved that is late is for an epoch that is over."""
        if reserved.epoch <= self.epoch or self._chunks.cut is NO_STREAM:
            return
        first = reserved.first_token
        if not self.ticket.cached_tokens <= first <= self.ticket.tokens:
            self._fail_both(HandoffFailure.REFUSED, f"token {first} is wanted of {self.ticket.tokens}")
            return
        self._go_back()  # a room that a dropped chunk leaves is not this epoch's yet
        self.epoch = reserved.epoch
        self.state = State.PUSHING
        self._chunks.go_on_from(first)
        self._headway.reserved(first, self._chunks.pushed)
        if not self._give_up(now):
            self._advance(now)

    def _note_pushed(self, pushed: Pushed, now: float) -> None:
        if pushed.epoch == self.epoch:
            self._headway.made()
            self._chunks.answered(pushed.first_token)
            awaited = self._chunks.unanswered or self.state is State.COMMITTING
            self.answer_due = now + self._patience if awaited else None

    def _finish(self, ack: Ack) -> None:
        if not self._committed:
            self._fail_here(HandoffFailure.REFUSED, "the ticket is used: its sequence decodes already")
            return
        self._close(State.DONE)
        self._ports.ask(self, Release(self.ticket.handoff_id, ack.epoch))
        self._ports.handed_off(self)

    def _retry_or_fail(self, refused: Refused, now: float) -> None:
        if refused.reason not in _RETRIED:
            self._fail_here(HandoffFailure.REFUSED, refused.message)
        elif refused.epoch == self.epoch and self.state is not State.OPENING:
            self._headway.refused(now)
            self._step_back(now)

    def _retry_unanswered(self, now: float) -> None:
        self._headway.waits(now - self._patience)
        self._step_back(now)

    def _step_back(self, now: float) -> None:
        """Ask again from where to go on."""
        if not self._give_up(now) and self._chunks.cut is not NO_STREAM:
            self._reserve_anew(self._chunks.cut, now)

    def _give_up(self, now: float) -> bool:
        why = self._headway.out(now)
        if why is not None:
            self._fail_both(*why)
        return why is not None

    def _fail_export(self, chunk: OutgoingChunk, failure: HandoffFailure, message: str) -> None:
        if chunk in self._chunks:
            self._chunks.remove(chunk)
            self._fail_both(failure, message)
        self._ports.drop(self, chunk)

    def _drop_export(self, chunk: OutgoingChunk, *_facts: Any) -> None:
        self._ports.drop(self, chunk)

    def _fail_both(self, failure: HandoffFailure, message: str) -> None:
        """Here, and on the other side."""
        self.failure = failure
        self._abort(ended=False)
        self._ports.fail(self, failure, message)

    def _end(self) -> None:
        self._abort(ended=True)

    def _abort(self, *, ended: bool) -> None:
        self._ports.ask(self, Abort(self.ticket.handoff_id, self.epoch, ended))
        self._close(State.FAILED)

    def _fail_aborted(self) -> None:
        self._fail_here(HandoffFailure.ABORTED, "the decode executor has ended the sequence")

    def _fail_here(self, failure: HandoffFailure, message: str) -> None:
        """The other side knows."""
        self.failure = failure
        self._close(State.FAILED)
        self._ports.fail(self, failure, message)

    def _close(self, state: State) -> None:
        self.state = state  # before: a room that a dropped chunk leaves is for others
        self._drop_chunks()
        self.answer_due = None
        self._ports.closed(self)

    def _say(self, message: Ask, now: float) -> None:
        self._note_said(now)
        self._ports.ask(self, message)

    def _note_said(self, now: float) -> None:
        self.said_at = now
        if self.answer_due is None:
            self.answer_due = now + self._patience

    @property
    def due(self) -> float:
        """When something is to be done about it at the latest, while there is a stream."""
        due = min(self.lease_ends, self.renew_at)
        return due if self.answer_due is None else min(due, self.answer_due)

    @property
    def renew_at(self) -> float:
        """When to say that it lives, if nothing else is said before."""
        return self.said_at + self._patience

    @property
    def _patience(self) -> float:
        return self.ticket.lease_seconds / 3

    def _ignore(self, *_facts: Any) -> None:
        """It came too late, or twice."""

    ROWS: ClassVar[Mapping[Event, _Row]] = {
        # columns: OPENING, PUSHING, COMMITTING, DONE, FAILED
        Event.COMPUTED: (_note_computed, _push_computed, _ignore, _ignore, _ignore),
        Event.DRAWN: (_note_drawn, _push_rest, _ignore, _ignore, _ignore),
        Event.ROOM: (_ignore, _export, _ignore, _ignore, _ignore),
        Event.EXPORTED: (_drop_export, _push, _drop_export, _drop_export, _drop_export),
        Event.EXPORT_FAILED: (_drop_export, _fail_export, _drop_export, _drop_export, _drop_export),
        Event.STREAM_UP: (_reserve, _change_stream, _change_stream, _ignore, _ignore),
        Event.STREAM_LOST: (_lose_stream, _lose_stream, _lose_stream, _ignore, _ignore),
        # A Reserve that came twice has begun two epochs; the later one is right, whatever was done under the first.
        Event.RESERVED: (_begin_epoch, _begin_epoch, _begin_epoch, _ignore, _ignore),
        Event.PUSHED: (_ignore, _note_pushed, _note_pushed, _ignore, _ignore),
        Event.ACK: (_finish, _finish, _finish, _ignore, _ignore),
        Event.REFUSED: (_retry_or_fail, _retry_or_fail, _retry_or_fail, _ignore, _ignore),
        Event.ABORTED: (_fail_aborted, _fail_aborted, _fail_aborted, _ignore, _ignore),
        Event.OVERDUE: (_retry_unanswered, _retry_unanswered, _retry_unanswered, _ignore, _ignore),
        Event.LEASE_EXPIRED: (_fail_both, _fail_both, _fail_both, _ignore, _ignore),
        Event.UNREACHABLE: (_fail_both, _fail_both, _fail_both, _ignore, _ignore),
        Event.SEQUENCE_ENDED: (_end, _end, _end, _ignore, _ignore),
    }


TABLE: Final[Mapping[tuple[State, Event], Callable[..., None]]] = by_state(State, Sender.ROWS)
