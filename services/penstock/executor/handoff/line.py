"""The prefill side of all handoffs to one decode executor: their senders, what they say, and the room that they share."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.counts import HandoffCounts, outcome
from penstock.executor.handoff.exports import fetch
from penstock.executor.handoff.geometry import Geometry
from penstock.executor.handoff.ports import KvEngine
from penstock.executor.handoff.rooms import Rooms
from penstock.executor.handoff.sender import Sender
from penstock.executor.handoff.sender_states import Cut, OutgoingChunk, State
from penstock.executor.handoff.speed import LinkSpeed
from penstock.executor.handoff.transports.port import Outgoing
from penstock.executor.handoff.words import (
    Abort,
    Aborted,
    Ack,
    Answer,
    Ask,
    Push,
    Pushed,
    Refusal,
    Refused,
    Release,
    Renew,
    Renewed,
    Reserved,
)

__all__ = ["Agreed", "Line"]


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the two executors have found out about each other, for one stream.

    Attributes:
        most_push_bytes: that one push may hold.
        window_bytes: that all together may.
    """

    outgoing: Outgoing
    native: bool
    most_push_bytes: int
    window_bytes: int


class Line:
    """Senders, and the stream that they share while there is one. Of one event loop.

    Args:
        left: told when a stream has ended that nobody needed any more.

    Attributes:
        why: the reason for which nothing is heard, as a failure and in words.
        wanted: set when there is something to send.
        stuck: set when the stream tells nothing any more, though it has not ended.
    """

    def __init__(
        self, executor_id: str, engine: KvEngine, geometry: Geometry, counts: HandoffCounts, left: Callable[[], None]
    ) -> None:
        self.executor_id = executor_id
        self.why: tuple[HandoffFailure, str] = (HandoffFailure.UNKNOWN_PEER, "the scheduler does not name the decode executor")
        self.wanted = asyncio.Event()
        self.stuck = asyncio.Event()
        self._engine = engine
        self._geometry = geometry
        self._counts = counts
        self._left = left
        self._loop = asyncio.get_running_loop()
        self._senders: dict[bytes, Sender] = {}
        self._asked_at: float | None = None  # the first thing since something was heard
        self._agreed: Agreed | None = None
        self._cut: Cut | None = None
        self._rooms = Rooms(0, _nowhere, LinkSpeed(self._measured))
        self._waiting: OrderedDict[bytes, Sender] = OrderedDict()
        self._turning = False
        self._tasks: dict[OutgoingChunk, tuple[asyncio.Task[None], int]] = {}
        self._out: deque[Ask] = deque()
        self._partings: dict[bytes, tuple[Abort, float]] = {}  # not answered yet, and until when they are said again

    @property
    def busy(self) -> bool:
        """Whether handoffs live on it, or the other side does not know yet that one has ended."""
        return bool(self._senders or self._partings)

    @property
    def done(self) -> bool:
        """Whether it may be forgotten: nothing lives on it, and it has no stream."""
        return self._agreed is None and not self.busy

    @property
    def senders(self) -> list[Sender]:
        """The live ones."""
        return list(self._senders.values())

    def due(self, now: float) -> float | None:
        """When the earliest of their leases ends, answers are late, or renewals are to be sent."""
        times = [end for _, end in self._partings.values()]
        if self._agreed is None:  # there may be a stream at any time, on which all of it counts again
            times += [min(s.lease_ends, now + s.ticket.lease_seconds / 3) for s in self.senders]
        else:
            times += [s.due for s in self.senders]
        return min(times, default=None)

    def join(self, sender: Sender) -> bool:
        """A new handoff; False where its ticket has been used on this executor."""
        if sender.ticket.handoff_id in self._senders:
            return False
        self._senders[sender.ticket.handoff_id] = sender
        if self._cut is not None:
            sender.stream_up(self._cut, self._loop.time())
        return True

    # What the stream tells

    def opened(self, agreed: Agreed) -> None:
        """A new stream, whose other end knows the handoffs."""
        self._agreed = agreed
        self.why = (HandoffFailure.LEASE_EXPIRED, "nothing was heard of the decode executor for a lease")
        cut = self._cut = self._cut_of(agreed)
        self._rooms = Rooms(agreed.window_bytes, agreed.outgoing.taken, LinkSpeed(self._measured))
        self._out.clear()
        now = self._loop.time()
        self._asked_at = None
        self.stuck.clear()
        for abort, _ in self._partings.values():
            self._queue(abort)
        for sender in self.senders:
            sender.stream_up(cut, now)

    def lost(self, failure: HandoffFailure, message: str) -> None:
        """It has ended, or could not be opened."""
        self.why = (failure, message)
        if self._agreed is None:
            return
        self._agreed = self._cut = None
        self._waiting.clear()
        self._out.clear()
        for sender in self.senders:
            sender.stream_lost(self._loop.time())
        if self.done:
            self._left()

    def unreachable(self, failure: HandoffFailure, message: str) -> None:
        """The other side will never take anything of this executor."""
        for sender in self.senders:
            sender.unreachable(failure, message)

    def next_message(self) -> Ask | None:
        """What is to be sent now."""
        return self._out.popleft() if self._out else None

    def hear(self, answer: Answer) -> None:
        """One answer."""
        now = self._loop.time()
        self._asked_at = None
        if isinstance(answer, Renewed):
            for held in filter(None, map(self._senders.get, answer.handoff_ids)):
                held.heard(now)
            return
        if _parts(answer):
            self._partings.pop(answer.handoff_id, None)
        sender = self._senders.get(answer.handoff_id)
        if sender is not None:
            sender.heard(now)
            _tell(sender, answer, now)
        if self._rooms.hear(answer, now):
            self._turn()

    def renew(self, now: float) -> None:
        """Say of all that have said nothing for a third of their lease that they live; give a stream up that answers nothing."""
        self._partings = {key: (abort, end) for key, (abort, end) in self._partings.items() if end > now}
        if self._agreed is None:
            return
        if self._asked_at is not None and any(self._asked_at + s.ticket.lease_seconds / 2 <= now for s in self.senders):
            self.stuck.set()
        quiet = [s for s in self.senders if s.renew_at <= now]
        for sender in quiet:
            sender.said_at = now
        if quiet:
            self._queue(Renew(tuple(s.ticket.handoff_id for s in quiet)))

    # What the senders ask for: `SenderPorts`

    def ask(self, sender: Sender, message: Ask) -> None:
        """Over the stream, if there is one; what ends a handoff, over the next one too."""
        if isinstance(message, Abort):
            self._partings[message.handoff_id] = (message, self._loop.time() + sender.ticket.lease_seconds)
        if self._agreed is not None:
            self._queue(message)

    def push(self, sender: Sender, chunk: OutgoingChunk, message: Push) -> None:  # noqa: ARG002 - whose it is
        """The chunk's room comes back with an answer from now on."""
        if self._agreed is None:
            return
        _, size = self._tasks.pop(chunk)
        self._rooms.tell(message, size, self._loop.time())
        self._counts.exported[self._agreed.outgoing.transport] += size
        self._queue(message)

    def want_room(self, sender: Sender) -> None:
        """A turn for one chunk."""
        self._waiting[sender.ticket.handoff_id] = sender
        self._turn()

    def export(self, sender: Sender, chunk: OutgoingChunk) -> None:
        """In a task, which waits for the engine and then for the transport."""
        if self._agreed is None:
            return
        size = self._size(len(chunk.tokens), native=chunk.native)
        self._rooms.take(size)
        fetching = fetch(self._engine, sender, chunk, self._agreed.outgoing)
        self._tasks[chunk] = self._loop.create_task(fetching), size

    def drop(self, sender: Sender, chunk: OutgoingChunk) -> None:  # noqa: ARG002 - whose it was
        """Its room is free again; what was put is taken back."""
        held = self._tasks.pop(chunk, None)
        if held is None:
            return
        task, size = held
        task.cancel()
        if chunk.parcel is not None and self._agreed is not None:
            self._agreed.outgoing.taken(chunk.parcel.payload)
        self._rooms.give(size)
        self._turn()

    def handed_off(self, sender: Sender) -> None:
        """The engine ends the sequence."""
        self._engine.handed_off(sender.handle)

    def fail(self, sender: Sender, failure: HandoffFailure, message: str) -> None:
        """The engine ends it, as failed."""
        self._engine.fail(sender.handle, failure, message)

    def closed(self, sender: Sender) -> None:
        """Nothing is awaited for it any more."""
        if self._senders.pop(sender.ticket.handoff_id, None) is not None:
            self._counts.sending -= 1
            if sender.state is State.DONE:
                self._counts.failing.done(self.executor_id, sends=True)
            else:
                self._counts.failing.failed(self.executor_id, sender.failure, self._loop.time(), sends=True)
            self._counts.sent["done" if sender.state is State.DONE else outcome(sender.failure)] += 1
        self._waiting.pop(sender.ticket.handoff_id, None)

    def close(self) -> None:
        """No copy is awaited any more."""
        for task, _ in self._tasks.values():
            task.cancel()

    def _turn(self) -> None:
        """One chunk for each that waits, round and round, as long as there is room."""
        if self._turning:
            return
        self._turning = True
        try:
            while self._waiting and self._cut is not None and self._rooms.has(self._most_bytes(self._cut)):
                _, sender = self._waiting.popitem(last=False)
                sender.room()
        finally:
            self._turning = False

    def _measured(self, speed: float) -> None:
        self._counts.measured(speed, self._loop.time())

    def _most_bytes(self, cut: Cut) -> int:
        return self._size(cut.most_tokens, native=cut.native)

    def _cut_of(self, agreed: Agreed) -> Cut:
        block_size, most_tokens = self._geometry.cut(agreed.most_push_bytes, agreed.window_bytes, native=agreed.native)
        return Cut(native=agreed.native, block_size=block_size, most_tokens=most_tokens, dtype=self._geometry.kv.canonical_dtype)

    def _size(self, tokens: int, *, native: bool) -> int:
        return self._geometry.size(tokens, native=native)

    def _queue(self, message: Ask) -> None:
        self._out.append(message)
        if self._asked_at is None and not isinstance(message, Release):
            self._asked_at = self._loop.time()
        self.wanted.set()


def _parts(answer: Answer) -> bool:
    """Whether the other side has heard of an end, or knows of none: other refusals answer what was said before."""
    return isinstance(answer, Aborted | Ack) or (
        isinstance(answer, Refused) and answer.reason in {Refusal.UNKNOWN, Refusal.NOT_YOURS}
    )


def _tell(sender: Sender, answer: Reserved | Pushed | Ack | Aborted | Refused, now: float) -> None:
    match answer:
        case Reserved():
            sender.reserved(answer, now)
        case Pushed():
            sender.pushed(answer, now)
        case Ack():
            sender.ack(answer)
        case Aborted():
            sender.aborted()
        case Refused():
            sender.refused(answer, now)


def _nowhere(_: object) -> None:
    """No stream, no room."""
