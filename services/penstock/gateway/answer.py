"""What a client is told, the same behind both doors."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Closing", "Delta", "Finish", "FinishReason", "Logprob", "TokenAlternative"]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Closing:
    """How a request ran. Times in seconds; `executor_ids` in the order of placement."""

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
