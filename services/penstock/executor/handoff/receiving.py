"""All handoffs of the executor as the side that decodes: tickets, receivers, leases, and what comes over the streams."""

from __future__ import annotations

import asyncio
import secrets
from typing import Protocol

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.alarm import Alarm
from penstock.executor.handoff.counts import HandoffCounts, outcome
from penstock.executor.handoff.geometry import Geometry
from penstock.executor.handoff.imports import Imports
from penstock.executor.handoff.ports import Handle, KvEngine
from penstock.executor.handoff.receiver import Receiver
from penstock.executor.handoff.receiver_states import IncomingChunk, State
from penstock.executor.handoff.ticket import Arrival, Receive, Ticket
from penstock.executor.handoff.transports.port import Incoming
from penstock.executor.handoff.words import (
    Abort,
    Aborted,
    Answer,
    Ask,
    Commit,
    Push,
    Refusal,
    Refused,
    Release,
    Renew,
    Renewed,
    Reserve,
)

__all__ = ["PeerStream", "Receiving", "mint"]


class PeerStream(Protocol):
    """One stream of a prefill executor."""

    @property
    def executor_id(self) -> str:
        """Whose it is."""

    @property
    def native(self) -> bool:
        """Whether blocks may come as they are."""

    @property
    def incoming(self) -> Incoming:
        """Where payload is opened."""

    def send(self, answer: Answer) -> None:
        """Queue an answer; of a stream that has ended, drop it."""


def mint(decode_executor_id: str, receive: Receive, cached_tokens: int, tokens: int, lease_seconds: float) -> Ticket:
    """A ticket that nobody can guess, for one prefill executor alone."""
    return Ticket(
        handoff_id=secrets.token_bytes(16),
        decode_executor_id=decode_executor_id,
        prefill_executor_id=receive.prefill_executor_id,
        cached_tokens=cached_tokens,
        tokens=tokens,
        lease_seconds=lease_seconds,
    )


class Receiving:
    """Of one event loop; the clock is the loop's. A handoff that has ended is remembered for a lease."""

    def __init__(self, engine: KvEngine, geometry: Geometry, counts: HandoffCounts) -> None:
        self._engine = engine
        self._geometry = geometry
        self._counts = counts
        self._loop = asyncio.get_running_loop()
        self._receivers: dict[bytes, Receiver] = {}
        self._by_handle: dict[int, Receiver] = {}
        self._streams: dict[str, PeerStream] = {}
        self._imports = Imports(engine, geometry)
        self._alarm = Alarm(self._ring)

    # What the engine tells

    def reserved(self, ticket: Ticket, handle: Handle) -> None:
        """Blocks are there."""
        receiver = Receiver(ticket, handle, self._geometry, self, self._loop.time())
        self._receivers[ticket.handoff_id] = self._by_handle[id(handle)] = receiver
        self._counts.receiving += 1
        self._alarm.by(receiver.lease_ends)

    def ended(self, handle: Handle) -> None:
        """The sequence is gone."""
        receiver = self._by_handle.get(id(handle))
        if receiver is not None:
            receiver.sequence_ended()

    # What the streams tell

    def stream_up(self, stream: PeerStream) -> None:
        """A prefill executor's stream; it replaces an older one."""
        self._lose(self._streams.get(stream.executor_id))
        self._streams[stream.executor_id] = stream

    def stream_lost(self, stream: PeerStream) -> None:
        """It has ended."""
        if self._streams.get(stream.executor_id) is stream:
            self._lose(self._streams.pop(stream.executor_id))

    def hear(self, stream: PeerStream, message: Ask) -> None:
        """One message. What is wrong with it is answered and counted, and nothing else comes of it."""
        if self._streams.get(stream.executor_id) is not stream:
            return  # a newer stream has replaced it
        if isinstance(message, Renew):
            self._renew(stream, message)
            return
        receiver = self._owned(stream, message)
        if receiver is None:
            return
        now = self._loop.time()
        receiver.heard(now)
        match message:
            case Reserve():
                self._reserve(stream, receiver, message)
            case Push():
                receiver.push(message, stream, now, native_agreed=stream.native)
            case Commit():
                receiver.commit(message, now)
            case Abort(ended=True):
                receiver.left()
            case Abort():
                receiver.abort()
            case Release():
                receiver.release()

    def _reserve(self, stream: PeerStream, receiver: Receiver, message: Reserve) -> None:
        """What the ticket says is checked only here: afterwards nothing of it is asked again."""
        if message.ticket.tokens != receiver.ticket.tokens or message.ticket.cached_tokens != receiver.ticket.cached_tokens:
            self._refuse(stream, message.handoff_id, 0, Refusal.UNKNOWN, "the ticket is not the one that was minted")
        else:
            receiver.reserve(stream)

    def _renew(self, stream: PeerStream, message: Renew) -> None:
        now = self._loop.time()
        held: list[bytes] = []
        for handoff_id in message.handoff_ids:
            receiver = self._receivers.get(handoff_id)
            if receiver is None or receiver.ticket.prefill_executor_id != stream.executor_id:
                self._refuse(stream, handoff_id, 0, *_unowned(receiver))
                continue
            receiver.heard(now)
            if receiver.live:
                held.append(handoff_id)
            receiver.renew()
        if held:
            stream.send(Renewed(tuple(held)))

    def _owned(self, stream: PeerStream, message: Reserve | Push | Commit | Abort | Release) -> Receiver | None:
        receiver = self._receivers.get(message.handoff_id)
        if receiver is not None and receiver.ticket.prefill_executor_id == stream.executor_id:
            return receiver
        if isinstance(message, Abort | Release) and receiver is None:
            stream.send(Aborted(message.handoff_id, message.epoch))  # long ago: room that is held for it is free
            return None
        epoch = 0 if isinstance(message, Reserve) else message.epoch
        first_token = message.tokens.start if isinstance(message, Push) else 0
        self._refuse(stream, message.handoff_id, epoch, *_unowned(receiver), first_token)
        return None

    def _refuse(
        self, stream: PeerStream, handoff_id: bytes, epoch: int, reason: Refusal, message: str, first_token: int = 0
    ) -> None:
        self._counts.refusals[reason] += 1
        stream.send(Refused(handoff_id, epoch, reason, message, first_token))

    def _lose(self, stream: PeerStream | None) -> None:
        if stream is not None:
            for receiver in list(self._receivers.values()):
                if receiver.ticket.prefill_executor_id == stream.executor_id:
                    receiver.stream_lost()

    # What the receivers ask for: `ReceiverPorts`

    def answer(self, receiver: Receiver, answer: Answer) -> None:
        """Over the peer's stream, if it has one."""
        if isinstance(answer, Refused):
            self._counts.refusals[answer.reason] += 1
        stream = self._streams.get(receiver.ticket.prefill_executor_id)
        if stream is not None:
            stream.send(answer)

    def check(self, receiver: Receiver, chunk: IncomingChunk) -> None:
        """In a task; the transport computes checksums beside the loop."""
        self._imports.check(receiver, chunk)

    def write(self, receiver: Receiver, chunk: IncomingChunk, data: memoryview) -> None:
        """In the engine's thread, between steps."""
        self._imports.write(receiver, chunk, data)

    def begin_decode(self, receiver: Receiver, first_token: int, arrival: Arrival) -> None:
        """The engine goes on."""
        self._counts.arrived(arrival)
        self._engine.begin_decode(receiver.handle, first_token, arrival)

    def leave(self, receiver: Receiver) -> None:
        """The engine ends it, and tells nobody."""
        self._engine.leave(receiver.handle)

    def fail(self, receiver: Receiver, failure: HandoffFailure, message: str) -> None:
        """The engine ends it."""
        self._engine.fail(receiver.handle, failure, message)

    def closed(self, receiver: Receiver) -> None:
        """Remembered for a lease, so that late messages get the same answer."""
        if self._by_handle.pop(id(receiver.handle), None) is not None:
            self._counts.receiving -= 1
            peer, done = receiver.ticket.prefill_executor_id, receiver.state is State.DONE
            if done:
                self._counts.failing.done(peer, sends=False)
            else:
                self._counts.failing.failed(peer, receiver.failure, self._loop.time(), sends=False)
            self._counts.received["done" if done else outcome(receiver.failure)] += 1
            receiver.lease_ends = self._loop.time() + receiver.ticket.lease_seconds
            self._alarm.by(receiver.lease_ends)

    def forget(self, receiver: Receiver) -> None:
        """The other side needs no answer any more."""
        self._receivers.pop(receiver.ticket.handoff_id, None)

    def _ring(self) -> float | None:
        now = self._loop.time()
        for receiver in list(self._receivers.values()):
            if receiver.lease_ends > now:
                continue
            if not receiver.live:
                self.forget(receiver)
            elif receiver.leased:
                receiver.lease_expired()
        return min((_look_again(receiver, now) for receiver in self._receivers.values()), default=None)

    def close(self) -> None:
        """Nothing is told any more."""
        self._alarm.stop()
        self._imports.close()


def _look_again(receiver: Receiver, now: float) -> float:
    """One that is COMMITTING may go back to where its lease counts."""
    return max(receiver.lease_ends, now + receiver.ticket.lease_seconds / 3) if receiver.committing else receiver.lease_ends


def _unowned(receiver: Receiver | None) -> tuple[Refusal, str]:
    if receiver is None:
        return Refusal.UNKNOWN, "no such handoff: forged, used up, or its lease has run out"
    return Refusal.NOT_YOURS, "the handoff was minted for another executor"
