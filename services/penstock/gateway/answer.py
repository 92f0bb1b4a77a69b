"""What a client is told, the same behind both doors."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.common.placement import PlacementReason

__all__ = [
    "Closing",
    "Delta",
    "Fallback",
    "FallbackReason",
    "Finish",
    "FinishReason",
    "Handoff",
    "Logprob",
    "TokenAlternative",
]


class FinishReason(enum.Enum):
    """Why a choice is complete."""

    STOP = "stop"
    STOP_SEQUENCE = "stop_sequence"
    LENGTH = "length"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"  # the gateway left before it was complete
    ERROR = "error"  # it could not be gone on with anywhere


@dataclass(frozen=True, slots=True)
class Finish:
    """The end of a choice, with the stop text or the stop token that ended it."""

    reason: FinishReason
    stop_text: str = ""
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class TokenAlternative:
    """One of the most likely tokens at a position."""

    token_id: int
    logprob: float
    token: bytes


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token's log-probability under the model, and the most likely ones in its place, best first."""

    token_id: int
    logprob: float
    token: bytes
    rank: int
    alternatives: Sequence[TokenAlternative]


class Fallback(enum.Enum):
    """What was done about a handoff, or an executor, that was lost."""

    NONE = "none"
    RECOMPUTE_ON_DECODE = "recompute_on_decode"
    REPLACED = "replaced"


class FallbackReason(enum.Enum):
    """Why. The first six are what executors say of a handoff; of the others, `decode` is the executor that decodes."""

    LEASE_EXPIRED = "lease_expired"
    ABORTED = "aborted"
    REFUSED = "refused"
    UNKNOWN_PEER = "unknown_peer"
    BACKEND = "backend"
    INCOMPATIBLE = "incompatible"
    PREFILL_LOST = "prefill_lost"
    PREFILL_REFUSED = "prefill_refused"
    PREFILL_FAILED = "prefill_failed"
    DECODE_LOST = "decode_lost"
    DECODE_REFUSED = "decode_refused"
    DECODE_FAILED = "decode_failed"


@dataclass(frozen=True, slots=True)
class Handoff:
    """KV that went from the executor that prefilled to the one that decodes. In a closing the sum, where it went more than once.

    Attributes:
        transfer_seconds: from the first push to the last import.
        exposed_seconds: the part of it behind the end of prefill.
        native: whether it went as the cache holds it.
    """

    kv_bytes: int
    transfer_seconds: float
    exposed_seconds: float
    transport: str
    native: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """How a request ran. Times in seconds; `executor_ids` in the order of placement.

    Attributes:
        prefill_executor_id: that computed the prompt last; the one that decoded, where both ran together.
        handoff: None where no KV was handed over.
        fallback: the last one that was taken.
        first_step_seconds: from the first token to the second; 0 where there is none.
        encode_seconds: from arrival to the first question for a place.
        first_token_seconds: from arrival to the first token; 0 where there is none.
        first_text_seconds: from arrival to the first text or finish that the client is told.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    executor_ids: Sequence[str]
    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float
    total_seconds: float
    replacements: int
    preemptions: int
    seed: int
    prefill_executor_id: str = ""
    decode_executor_id: str = ""
    placement_reason: PlacementReason = PlacementReason.UNSPECIFIED
    handoff: Handoff | None = None
    fallback: Fallback = Fallback.NONE
    fallback_reason: FallbackReason | None = None
    first_step_seconds: float = 0.0
    encode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    first_text_seconds: float = 0.0


@dataclass(slots=True)
class Delta:
    """What has been added to a choice since the last delta of it."""

    index: int
    parts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def text(self) -> str:
        """The added text."""
        parts = self.parts
        return parts[0] if len(parts) == 1 else "".join(parts)
