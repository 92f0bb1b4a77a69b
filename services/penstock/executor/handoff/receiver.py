"""The decode side of one handoff, from the ticket to the first step behind the KV that came.

What happens to it is an `Event`; what an event does in a state stands in one table at the end, and nowhere else. Every message may
come twice, late, or from before the stream was lost: an epoch, which grows with every Reserve, tells.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final

from penstock.common.handoff import HandoffFailure
from penstock.common.tables import by_state
from penstock.executor.handoff.geometry import Fault, Geometry
from penstock.executor.handoff.progress import ArrivalClock
from penstock.executor.handoff.receiver_states import Event, IncomingChunk, ReceiverPorts, State, Taken
from penstock.executor.handoff.ticket import Ticket, Transport
from penstock.executor.handoff.words import Aborted, Ack, Answer, Commit, Push, Pushed, Refusal, Refused, Reserved

__all__ = ["TABLE", "Receiver"]


_Row = tuple[Callable[..., None], ...]


class Receiver:
    """One handoff. Every public method is an event, or renews the lease; `now` is in monotonic seconds.

    Args:
        handle: the engine's.
        geometry: of this executor's cache.
    """

    def __init__(self, ticket: Ticket, handle: Any, geometry: Geometry, ports: ReceiverPorts, now: float) -> None:
        self.ticket = ticket
        self.handle = handle
        self.state = State.RESERVED
        self.epoch = 0
        self.failure: HandoffFailure | None = None
        self.lease_ends = now + ticket.lease_seconds
        self._geometry = geometry
        self._ports = ports
        self._expected = ticket.cached_tokens
        # By first token, what is not refused: first on its way, then there.
        self._accepted: dict[int, IncomingChunk] = {}
        self._taken: dict[int, Taken] = {}
        self._unchecked: deque[IncomingChunk] = deque()
        self._writing: set[IncomingChunk] = set()
        self._first_token: int | None = None
        self._clock = ArrivalClock(now)

    @property
    def live(self) -> bool:
        """Whether the sequence still waits."""
        return self.state not in {State.DONE, State.ENDED}

    @property
    def leased(self) -> bool:
        """Whether it waits for the other side."""
        return self.state in {State.RESERVED, State.RECEIVING}

    @property
    def committing(self) -> bool:
        """Whether it waits for this side alone, if nothing is lost or wrong."""
        return self.state is State.COMMITTING

    # What happens

    def heard(self, now: float) -> None:
        """The other side has said something about it."""
        if self.live:
            self.lease_ends = now + self.ticket.lease_seconds

    def reserve(self, source: Any) -> None:
        self._apply(Event.RESERVE, source)

    def push(self, push: Push, source: Any, now: float, *, native_agreed: bool) -> None:
        self._apply(Event.PUSH, push, source, now, native_agreed)

    def checked(self, chunk: IncomingChunk, data: memoryview) -> None:
        self._apply(Event.CHECKED, chunk, data)

    def unreadable(self, chunk: IncomingChunk, fault: Fault) -> None:
        self._apply(Event.UNREADABLE, chunk, fault)

    def imported(self, chunk: IncomingChunk, transport: Transport, now: float) -> None:
        self._apply(Event.IMPORTED, chunk, transport, now)

    def import_failed(self, chunk: IncomingChunk, message: str) -> None:
        self._apply(Event.IMPORT_FAILED, chunk, message)

    def commit(self, commit: Commit, now: float) -> None:
        self._apply(Event.COMMIT, commit, now)

    def renew(self) -> None:
        self._apply(Event.RENEW)

    def abort(self) -> None:
        self._apply(Event.ABORT)

    def left(self) -> None:
        self._apply(Event.LEFT)

    def release(self) -> None:
        self._apply(Event.RELEASE)

    def stream_lost(self) -> None:
        self._apply(Event.STREAM_LOST)

    def lease_expired(self) -> None:
        self._apply(Event.LEASE_EXPIRED)

    def sequence_ended(self) -> None:
        self._apply(Event.SEQUENCE_ENDED)

    # What is done about it

    def _apply(self, event: Event, *facts: Any) -> None:
        TABLE[self.state, event](self, *facts)

    def _begin_epoch(self, source: Any) -> None:
        """Whatever of an earlier epoch is not being written already is wanted again.

        What has come over the same stream is answered again, for an answer that was lost keeps room on the other side.
        """
        if self.epoch:
            self._clock.resumptions += 1
        self.epoch += 1
        if self.state is State.RESERVED:
            self.state = State.RECEIVING
        self._drop_unchecked()
        self._tell(Reserved(self.ticket.handoff_id, self.epoch, self._expected))
        for taken in self._taken.values():
            if taken.source is source:
                self._tell(Pushed(self.ticket.handoff_id, taken.epoch, taken.tokens.start))

    def _drop_unchecked(self) -> None:
        """Forget chunks that are not checked: their bytes may be gone with the stream."""
        if self._unchecked:
            self._drop_from(self._unchecked[0])

    def _drop_from(self, chunk: IncomingChunk) -> None:
        """Chunks are checked one by one, in order, so all behind this one are unchecked."""
        while self._unchecked and self._unchecked[-1] is not chunk:
            self._accepted.pop(self._unchecked.pop().push.tokens.start)
        self._unchecked.pop()
        self._accepted.pop(chunk.push.tokens.start)
        self._expected = chunk.push.tokens.start
        if self.state is State.COMMITTING:
            self.state = State.RECEIVING

    def _accept(self, push: Push, source: Any, now: float, native_agreed: bool) -> None:
        if self._is_repeated(push):
            return
        if push.epoch != self.epoch:
            self._refuse_stale(push)
            return
        fault = self._fault(push, native_agreed=native_agreed)
        if fault is not None:
            self._refuse(push, fault)
            return
        chunk = IncomingChunk(push, source)
        self._clock.pushed(now)
        self._accepted[push.tokens.start] = chunk
        self._expected = push.tokens.stop
        self._unchecked.append(chunk)
        if len(self._unchecked) == 1:
            self._ports.check(self, chunk)

    def _is_repeated(self, push: Push) -> bool:
        """Whether it comes again; told that it is imported, if it is.

        Also one of an earlier epoch that is being written: behind a refusal the other side would write over what is read.
        """
        first, epochs = push.tokens.start, {self.epoch}
        taken, coming = self._taken.get(first), self._accepted.get(first)
        if taken is not None and taken.tokens == push.tokens and push.epoch in epochs | {taken.epoch}:
            self._tell(Pushed(push.handoff_id, push.epoch, first))
            return True
        return coming is not None and coming.push.tokens == push.tokens and push.epoch in epochs | {coming.push.epoch}

    def _fault(self, push: Push, *, native_agreed: bool) -> Fault | None:
        tokens, end = push.tokens, self.ticket.tokens
        if not tokens or tokens.stop > end or tokens.start != self._expected:
            due = f"{self._expected} to {end} are due"
            return Refusal.OUT_OF_RANGE, f"tokens {tokens.start} to {tokens.stop} came where {due}"
        return self._geometry.fault(push, end, native_agreed=native_agreed)

    def _write(self, chunk: IncomingChunk, data: memoryview) -> None:
        if not self._unchecked or self._unchecked[0] is not chunk:
            return  # it was dropped meanwhile
        fault = self._geometry.wrong_size(chunk.push, data.nbytes)
        if fault is not None:
            self._refuse_chunk(chunk, fault)
            return
        self._unchecked.popleft()
        self._writing.add(chunk)
        self._ports.write(self, chunk, data)
        if self._unchecked:
            self._ports.check(self, self._unchecked[0])

    def _refuse_chunk(self, chunk: IncomingChunk, fault: Fault) -> None:
        if self._unchecked and self._unchecked[0] is chunk:
            self._drop_from(chunk)
            self._refuse(chunk.push, fault)

    def _note_import(self, chunk: IncomingChunk, transport: Transport, _now: float) -> None:
        self._writing.discard(chunk)
        push = chunk.push
        del self._accepted[push.tokens.start]
        self._taken[push.tokens.start] = Taken(push.tokens, push.epoch, chunk.source)
        size = self._geometry.size(len(push.tokens), native=push.native, dtype=push.dtype)
        self._clock.imported(size, transport, native=push.native)
        self._tell(Pushed(push.handoff_id, push.epoch, push.tokens.start))

    def _finish_import(self, chunk: IncomingChunk, transport: Transport, now: float) -> None:
        self._note_import(chunk, transport, now)
        self._decode_if_complete(now)

    def _commit(self, commit: Commit, now: float) -> None:
        fault = self._fault_of_commit(commit)
        if fault is not None:
            self._refuse(commit, fault)
            return
        self.state = State.COMMITTING
        self._first_token = commit.first_token_id
        self._clock.committed(now)
        self._decode_if_complete(now)

    def _commit_again(self, commit: Commit, _now: float) -> None:
        fault = self._fault_of_commit(commit)
        if fault is None and commit.first_token_id != self._first_token:
            fault = Refusal.OUT_OF_RANGE, f"token {commit.first_token_id} came behind token {self._first_token}"
        if fault is not None:
            self._refuse(commit, fault)

    def _fault_of_commit(self, commit: Commit) -> Fault | None:
        if commit.epoch != self.epoch:
            return self._stale(commit)
        if commit.tokens != self.ticket.tokens:
            return Refusal.OUT_OF_RANGE, f"{commit.tokens} tokens are committed where {self.ticket.tokens} are reserved"
        if commit.first_token_id >= self._geometry.vocabulary_size:
            return Refusal.OUT_OF_RANGE, f"the vocabulary of {self._geometry.vocabulary_size} has no token {commit.first_token_id}"
        if self._expected < self.ticket.tokens:
            return Refusal.INCOMPLETE, f"{self._expected} of {self.ticket.tokens} tokens have come"
        return None

    def _decode_if_complete(self, now: float) -> None:
        if self._unchecked or self._writing or self._first_token is None:
            return
        self.state = State.DONE
        self._taken.clear()
        self._ports.begin_decode(self, self._first_token, self._clock.arrival(now))
        self._ack()
        self._ports.closed(self)

    def _fail_aborted(self) -> None:
        self._fail(HandoffFailure.ABORTED, "the prefill executor has given the sequence up")

    def _leave(self) -> None:
        self._ports.leave(self)
        self._end()

    def _fail_import(self, chunk: IncomingChunk, message: str) -> None:
        self._writing.discard(chunk)
        self._fail(HandoffFailure.BACKEND, message)

    def _fail_expired(self) -> None:
        self._fail(HandoffFailure.LEASE_EXPIRED, f"nothing was heard for {self.ticket.lease_seconds:g} s")

    def _fail(self, failure: HandoffFailure, message: str) -> None:
        self.failure = failure
        self._ports.fail(self, failure, message)
        self._end()

    def _end(self) -> None:
        self.state = State.ENDED
        for kept in (self._unchecked, self._accepted, self._taken):
            kept.clear()
        self._ports.closed(self)
        self._tell_aborted()

    def _tell_aborted(self, *_facts: Any) -> None:
        """Once nothing of it is read any more: behind this answer the other side writes where the bytes lay."""
        if not self._writing:
            self._tell(Aborted(self.ticket.handoff_id, self.epoch))

    def _end_write(self, chunk: IncomingChunk, *_facts: Any) -> None:
        self._writing.discard(chunk)
        self._tell_aborted()

    def _refuse(self, message: Push | Commit, fault: Fault) -> None:
        first_token = message.tokens.start if isinstance(message, Push) else 0
        self._tell(Refused(self.ticket.handoff_id, message.epoch, fault[0], fault[1], first_token))

    def _refuse_stale(self, message: Push | Commit, *_facts: Any) -> None:
        self._refuse(message, self._stale(message))

    def _stale(self, message: Push | Commit) -> Fault:
        return Refusal.STALE_EPOCH, f"epoch {message.epoch} is not {self.epoch}"

    def _ack(self, *_facts: Any) -> None:
        self._tell(Ack(self.ticket.handoff_id, self.epoch))

    def _forget(self) -> None:
        self._ports.forget(self)

    def _tell(self, answer: Answer) -> None:
        self._ports.answer(self, answer)

    def _ignore(self, *_facts: Any) -> None:
        """It came too late, or twice, or says nothing but that the other side lives."""

    ROWS: ClassVar[Mapping[Event, _Row]] = {
        # columns: RESERVED, RECEIVING, COMMITTING, DONE, ENDED
        Event.RESERVE: (_begin_epoch, _begin_epoch, _begin_epoch, _ack, _tell_aborted),
        Event.PUSH: (_refuse_stale, _accept, _accept, _ack, _tell_aborted),
        Event.CHECKED: (_ignore, _write, _write, _ignore, _ignore),
        Event.UNREADABLE: (_ignore, _refuse_chunk, _refuse_chunk, _ignore, _ignore),
        Event.IMPORTED: (_ignore, _note_import, _finish_import, _ignore, _end_write),
        Event.IMPORT_FAILED: (_ignore, _fail_import, _fail_import, _ignore, _end_write),
        Event.COMMIT: (_refuse_stale, _commit, _commit_again, _ack, _tell_aborted),
        Event.RENEW: (_ignore, _ignore, _ignore, _ack, _tell_aborted),
        # Of whichever epoch: who holds the ticket never goes on behind its own Abort.
        Event.ABORT: (_fail_aborted, _fail_aborted, _fail_aborted, _ack, _tell_aborted),
        Event.LEFT: (_leave, _leave, _leave, _ack, _tell_aborted),
        Event.RELEASE: (_ignore, _ignore, _ignore, _forget, _ignore),
        Event.STREAM_LOST: (_ignore, _drop_unchecked, _drop_unchecked, _ignore, _ignore),
        # Nothing that is awaited while COMMITTING comes from the other side.
        Event.LEASE_EXPIRED: (_fail_expired, _fail_expired, _ignore, _ignore, _ignore),
        Event.SEQUENCE_ENDED: (_end, _end, _end, _ignore, _ignore),
    }


TABLE: Final[Mapping[tuple[State, Event], Callable[..., None]]] = by_state(State, Receiver.ROWS)
