"""Where a handoff can be on the side that decodes, what can happen to it, and what it asks for."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.ticket import Arrival
from penstock.executor.handoff.words import Answer, Push

if TYPE_CHECKING:
    from penstock.executor.handoff.receiver import Receiver

__all__ = ["Event", "IncomingChunk", "ReceiverPorts", "State", "Taken"]


class State(enum.Enum):
    """Where a handoff is on the side that decodes."""

    RESERVED = "reserved"  # blocks are there, and a ticket; nothing was heard yet
    RECEIVING = "receiving"  # an epoch has begun, and KV comes
    COMMITTING = "committing"  # all KV and the first token are here; imports are awaited
    DONE = "done"  # the sequence decodes; late messages are answered as before
    ENDED = "ended"  # the sequence is gone; so are they


class Event(enum.Enum):
    """What happens to it."""

    RESERVE = "reserve"
    PUSH = "push"
    CHECKED = "checked"  # a chunk's bytes are here, and right
    UNREADABLE = "unreadable"  # they are not
    IMPORTED = "imported"
    IMPORT_FAILED = "import failed"
    COMMIT = "commit"
    RENEW = "renew"
    ABORT = "abort"
    LEFT = "left"  # the sequence has ended on the other side
    RELEASE = "release"
    STREAM_LOST = "stream lost"
    LEASE_EXPIRED = "lease expired"
    SEQUENCE_ENDED = "sequence ended"


class IncomingChunk:
    """One push on its way into the blocks. Compared by identity."""

    __slots__ = ("__weakref__", "push", "source")

    def __init__(self, push: Push, source: Any) -> None:
        self.push = push
        self.source = source


class Taken(NamedTuple):
    """What is kept of a push that was imported: its bytes are not."""

    tokens: range
    epoch: int
    source: Any


class ReceiverPorts(Protocol):
    """What a receiver asks for. Every call returns at once; answers are events."""

    def answer(self, receiver: Receiver, answer: Answer) -> None:
        """Send to the other side, if a stream of it is there."""

    def check(self, receiver: Receiver, chunk: IncomingChunk) -> None:
        """Have the chunk's bytes fetched and checked: `checked` or `unreadable`."""

    def write(self, receiver: Receiver, chunk: IncomingChunk, data: memoryview) -> None:
        """Have them written into the sequence's blocks: `imported` or `import_failed`."""

    def begin_decode(self, receiver: Receiver, first_token: int, arrival: Arrival) -> None:
        """The sequence goes on here."""

    def leave(self, receiver: Receiver) -> None:
        """The sequence has ended on the other side."""

    def fail(self, receiver: Receiver, failure: HandoffFailure, message: str) -> None:
        """The sequence ends here."""

    def closed(self, receiver: Receiver) -> None:
        """DONE or ENDED was reached."""

    def forget(self, receiver: Receiver) -> None:
        """Nothing more will be asked of it."""
