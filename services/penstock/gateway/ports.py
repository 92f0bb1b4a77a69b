"""What the state machine of a request needs of the other services, and what they tell it."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from penstock.common.errors import PenstockError
from penstock.common.placement import PlacementReason
from penstock.gateway.answer import Closing, Finish, Logprob

if TYPE_CHECKING:
    from penstock.gateway.choice import Choice
    from penstock.gateway.machine import Request

__all__ = [
    "DecodingPort",
    "ExecutionPort",
    "Lease",
    "Loss",
    "OutputPort",
    "PlacementPort",
    "Placing",
    "Ports",
    "PrefillLease",
    "Refusal",
    "SequenceEnd",
    "SequenceStart",
    "Text",
    "TokenReport",
]


@dataclass(frozen=True, slots=True)
class PrefillLease:
    """Leave to compute the first running choice's prompt on an executor of its own."""

    executor_id: str
    address: str
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Lease:
    """Leave to run on one executor, or on two: `prefill` is the other one, where prefill runs apart."""

    executor_id: str
    address: str
    tokens: int = 0
    queued_seconds: float = 0.0
    prefill: PrefillLease | None = None
    reason: PlacementReason = PlacementReason.UNSPECIFIED

    def without_prefill(self) -> Lease:
        """What is left of it when the prefill half was given back."""
        return replace(self, prefill=None)


@dataclass(frozen=True, slots=True)
class Placing:
    """A request for a lease.

    Attributes:
        replacing: it ran before.
        avoid: the executors that it was lost on.
        failures: placements in a row that brought no token; the more, the later it is asked again.
        replayed: output tokens that are computed again behind the prompt, of the choice that has most of them.
    """

    replacing: bool
    avoid: Sequence[str] = ()
    failures: int = 0
    replayed: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """The scheduler's no. `error` is what the client is told."""

    error: PenstockError


@dataclass(frozen=True, slots=True)
class SequenceStart:
    """A sequence's first report."""

    cached_tokens: int
    waited_seconds: float
    prefill_seconds: float


class SequenceEnd(enum.Enum):
    """How an executor ended a sequence for good."""

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"


class Loss(enum.Enum):
    """How a sequence was lost."""

    LOST = "lost"  # with its executor, or with the stream to it
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(slots=True)
class TokenReport:
    """Log-probability of a token and of the most likely ones in its place. `rank` 1 is the most likely."""

    token_id: int
    logprob: float
    rank: int
    top_ids: Sequence[int]
    top_logprobs: Sequence[float]


@dataclass(frozen=True, slots=True)
class Text:
    """Decoded text: after it, `tokens` of the choice's tokens are told and `byte_offset` + its own bytes of text."""

    text: str
    byte_offset: int
    tokens: int
    stop_index: int | None = None
    last: bool = False


class PlacementPort(Protocol):
    """The scheduler. Calls are never refused here: what can not be sent now is asked for again when the scheduler is back."""

    def place(self, request: Request, placing: Placing) -> None:
        """Ask for a lease."""

    def announce(self, request: Request, lease: Lease) -> None:
        """Tell a restarted scheduler of a lease."""

    def prefilled(self, request: Request) -> None:
        """Give the prefill half of a lease back."""

    def release(self, request: Request) -> None:
        """Give a lease or a place in the queue back. Idempotent."""


class ExecutionPort(Protocol):
    """The executors. Sequence ids are unique in this gateway."""

    def start(self, lease: Lease, choice: Choice) -> int:
        """Start, or go on with, a choice's sequence; its id."""

    def receive(self, lease: Lease, prefill: PrefillLease, choice: Choice) -> int:
        """Start the half of a choice that decodes behind KV that comes from another executor."""

    def send(self, prefill: PrefillLease, ticket: bytes, choice: Choice) -> int:
        """Start the half that draws the first token and hands its KV over; `ticket` is the other half's, as it was told."""

    def abort(self, sequence_id: int) -> None:
        """Stop a sequence and hear no more of it. Idempotent."""


class DecodingPort(Protocol):
    """The tokenizer's decoding stream. `choice.decoding_id` names a decoding."""

    def open(self, choice: Choice) -> None:
        """Begin to decode a choice, from the tokens that it has already."""

    def token(self, decoding_id: int, token_id: int) -> None:
        """The next token."""

    def describe(self, choice: Choice, token_ids: Sequence[int]) -> None:
        """Ask for the tokens' own bytes."""

    def finish(self, decoding_id: int) -> None:
        """No token follows: let out what is held back."""

    def close(self, decoding_id: int) -> None:
        """Forget a decoding. Idempotent."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The other services, as all requests of a gateway use them."""

    placement: PlacementPort
    execution: ExecutionPort
    decoding: DecodingPort


class OutputPort(Protocol):
    """Where a request's answer goes. Choices are counted from 0 within the request."""

    def text(self, index: int, text: str, token_ids: Sequence[int], logprobs: Sequence[Logprob]) -> None:
        """More of a choice."""

    def prompt(self, index: int, logprobs: Sequence[Logprob]) -> None:
        """Log-probabilities of the prompt's tokens but the first, before the choice's first text."""

    def finish(self, index: int, finish: Finish) -> None:
        """A choice is complete."""

    def close(self, closing: Closing) -> None:
        """All choices are complete. Nothing follows."""

    def fail(self, error: PenstockError) -> None:
        """The request failed. Nothing follows."""
