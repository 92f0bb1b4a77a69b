"""What two executors say to each other about a handoff, as plain types. What each means stands in handoff.proto."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from penstock.executor.handoff.ticket import Ticket
from penstock.executor.handoff.transports.port import Parcel

__all__ = [
    "Abort",
    "Aborted",
    "Ack",
    "Answer",
    "Ask",
    "Commit",
    "Push",
    "Pushed",
    "Refusal",
    "Refused",
    "Release",
    "Renew",
    "Renewed",
    "Reserve",
    "Reserved",
]


class Refusal(enum.Enum):
    """Why a message was not obeyed. The value stands in metrics."""

    UNKNOWN = "unknown"
    NOT_YOURS = "not_yours"
    UNREGISTERED = "unregistered"
    STALE_EPOCH = "stale_epoch"
    WRONG_MODEL = "wrong_model"
    OUT_OF_RANGE = "out_of_range"
    WRONG_SIZE = "wrong_size"
    WRONG_DTYPE = "wrong_dtype"
    WRONG_CHECKSUM = "wrong_checksum"
    INCOMPLETE = "incomplete"
    UNPROVEN = "unproven"


@dataclass(frozen=True, slots=True)
class Reserve:
    """Begin, or go on."""

    ticket: Ticket

    @property
    def handoff_id(self) -> bytes:
        """Of the ticket."""
        return self.ticket.handoff_id


@dataclass(frozen=True, slots=True)
class Push:
    """KV of a range of tokens over all layers.

    Attributes:
        native: whole blocks as the cache holds them, and not the canonical form.
        dtype: numpy's name of the values' type, for the canonical form.
    """

    handoff_id: bytes
    epoch: int
    tokens: range
    native: bool
    dtype: str
    parcel: Parcel


@dataclass(frozen=True, slots=True)
class Commit:
    """All KV has been pushed: decode behind this token."""

    handoff_id: bytes
    epoch: int
    tokens: int
    first_token_id: int


@dataclass(frozen=True, slots=True)
class Renew:
    """Nothing has come to pass yet, but it will."""

    handoff_ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Abort:
    """The prefill side gives up, or the sequence has `ended` there by itself."""

    handoff_id: bytes
    epoch: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """The prefill side has heard the Ack."""

    handoff_id: bytes
    epoch: int


@dataclass(frozen=True, slots=True)
class Reserved:
    """KV is wanted from `first_token` on, under this epoch."""

    handoff_id: bytes
    epoch: int
    first_token: int


@dataclass(frozen=True, slots=True)
class Pushed:
    """A push has been imported: its room can be used again."""

    handoff_id: bytes
    epoch: int
    first_token: int


@dataclass(frozen=True, slots=True)
class Ack:
    """The sequence decodes here now."""

    handoff_id: bytes
    epoch: int


@dataclass(frozen=True, slots=True)
class Renewed:
    """Those that are still held."""

    handoff_ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Aborted:
    """The decode side has ended the sequence, and reads nothing more that was pushed for it."""

    handoff_id: bytes
    epoch: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A message was not obeyed; nothing has changed by it. `first_token` is that of the Push that it answers."""

    handoff_id: bytes
    epoch: int
    reason: Refusal
    message: str
    first_token: int = 0


Ask = Reserve | Push | Commit | Renew | Abort | Release
Answer = Reserved | Pushed | Ack | Renewed | Aborted | Refused
