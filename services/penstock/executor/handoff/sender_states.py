"""Where a handoff can be on the side that prefills, what can happen to it, and what it asks for."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from penstock.common.handoff import HandoffFailure
from penstock.executor.handoff.transports.port import Parcel
from penstock.executor.handoff.words import Ask, Push

if TYPE_CHECKING:
    from penstock.executor.handoff.sender import Sender

__all__ = ["NO_STREAM", "Cut", "Event", "OutgoingChunk", "SenderPorts", "State"]


class State(enum.Enum):
    """Where a handoff is on the side that prefills."""

    OPENING = "opening"  # no Reserved on this stream yet, or no stream
    PUSHING = "pushing"  # KV goes as it is computed
    COMMITTING = "committing"  # all has gone; the Ack is awaited
    DONE = "done"  # the other side decodes
    FAILED = "failed"  # the sequence is gone, or the handoff is


class Event(enum.Enum):
    """What happens to it."""

    COMPUTED = "computed"
    DRAWN = "drawn"
    ROOM = "room"  # the link has room for the chunk that was asked for
    EXPORTED = "exported"
    EXPORT_FAILED = "export failed"
    STREAM_UP = "stream up"
    STREAM_LOST = "stream lost"
    RESERVED = "reserved"
    PUSHED = "pushed"
    ACK = "ack"
    REFUSED = "refused"
    ABORTED = "aborted"
    OVERDUE = "overdue"  # no answer for a third of a lease
    LEASE_EXPIRED = "lease expired"
    UNREACHABLE = "unreachable"  # the other side can not take it at all
    SEQUENCE_ENDED = "sequence ended"


@dataclass(frozen=True, slots=True)
class Cut:
    """How KV is cut into pushes on a stream.

    Attributes:
        native: whether blocks go as they are.
        block_size: tokens of a block; 1 where a whole one is more than there is room for.
        most_tokens: of a push at most: whole blocks.
        dtype: numpy's name of the values' type, for the canonical form.
    """

    native: bool
    block_size: int
    most_tokens: int
    dtype: str


NO_STREAM = Cut(native=False, block_size=1, most_tokens=0, dtype="")


class OutgoingChunk:
    """KV on its way out; `parcel` once it was copied out. Compared by identity."""

    __slots__ = ("native", "parcel", "tokens")

    def __init__(self, tokens: range, *, native: bool) -> None:
        self.tokens = tokens
        self.native = native
        self.parcel: Parcel | None = None


class SenderPorts(Protocol):
    """What a sender asks for. Every call returns at once; answers are events."""

    def ask(self, sender: Sender, message: Ask) -> None:
        """Send to the other side, if there is a stream."""

    def push(self, sender: Sender, chunk: OutgoingChunk, message: Push) -> None:
        """Send a chunk, which is not the sender's any more."""

    def want_room(self, sender: Sender) -> None:
        """Have a `room` once the link has some; asking twice is asking once."""

    def export(self, sender: Sender, chunk: OutgoingChunk) -> None:
        """Have the chunk copied out and put where the other side can reach it: `exported` or `export_failed`."""

    def drop(self, sender: Sender, chunk: OutgoingChunk) -> None:
        """A chunk that was asked for and will not be pushed."""

    def handed_off(self, sender: Sender) -> None:
        """The sequence ends here; the other side decodes."""

    def fail(self, sender: Sender, failure: HandoffFailure, message: str) -> None:
        """The sequence ends here."""

    def closed(self, sender: Sender) -> None:
        """DONE or FAILED was reached."""
