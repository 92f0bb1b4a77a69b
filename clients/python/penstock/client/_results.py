"""What calls return: plain frozen dataclasses, so that no message of the wire leaves the client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

__all__ = [
    "Alternative",
    "Calibration",
    "Choice",
    "Closing",
    "Event",
    "Fallback",
    "Finish",
    "FinishReason",
    "Handoff",
    "Model",
    "ModelExecutor",
    "Placement",
    "PlacementReason",
    "Result",
    "TokenCount",
    "TokenLogprob",
    "Usage",
]


class FinishReason(StrEnum):
    """Why an answer ended."""

    UNSPECIFIED = "unspecified"
    STOP = "stop"
    STOP_SEQUENCE = "stop_sequence"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Finish:
    """How a choice ended: by which stop text or which token, where it was one."""

    reason: FinishReason
    stop_text: str | None = None
    stop_token_id: int | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """A token that was likely at its place; `token` is bytes, since it may hold a part of a character."""

    token_id: int
    logprob: float
    token: bytes


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log-probability under the model, its rank (1 is the most likely), and the most likely tokens, best first."""

    token_id: int
    logprob: float
    token: bytes
    rank: int
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True)
class Event:
    """One piece of a stream: new text of choice `index`, and what was asked for beside it. `finish` ends the choice."""

    index: int
    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One whole answer."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob, ...]
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; completions over all choices, `cached_tokens` of the prompts found in the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a choice ran."""

    executor_id: str
    backend: str
    device: str


class PlacementReason(StrEnum):
    """Why a request ran together or apart."""

    UNSPECIFIED = "unspecified"
    POLICY = "policy"
    COST = "cost"
    NO_PREFILL_EXECUTOR = "no_prefill_executor"
    NO_DECODE_EXECUTOR = "no_decode_executor"
    ONE_TOKEN = "one_token"  # noqa: S105 - no password
    CACHED = "cached"
    INCOMPATIBLE = "incompatible"
    REPLACED = "replaced"
    UNREACHABLE = "unreachable"


class Fallback(StrEnum):
    """What was done about a handoff, or an executor, that was lost."""

    UNSPECIFIED = "unspecified"
    NONE = "none"
    RECOMPUTE_ON_DECODE = "recompute_on_decode"
    REPLACED = "replaced"


@dataclass(frozen=True, slots=True)
class Handoff:
    """KV that went from the executor that prefilled to the one that decoded.

    Attributes:
        transfer_seconds: from the first piece to the last.
        exposed_seconds: the part of it behind the end of prefill.
        transport: shared_memory, grpc or nixl.
        native: whether it went over as the cache holds it, without conversion.
    """

    kv_bytes: int
    transfer_seconds: float
    exposed_seconds: float
    transport: str
    native: bool


@dataclass(frozen=True, slots=True)
class Closing:
    """Where a request ran and where its time went, in seconds.

    Attributes:
        prefill_executor_id: that computed the prompt last; the one that decoded, where both ran together.
        handoff: None where no KV was handed over.
        fallback_reason: a word, as in the metric penstock_fallbacks; empty without a fallback.
        first_step_seconds: from the first token, which prefill gives, to the second.
        encode_seconds: from the request's arrival, through checking and encoding, to the question for a place.
        first_token_seconds: from arrival to the first token. Beside encoding, queue and prefill it holds hops between services.
        first_text_seconds: from arrival to the first text on its way to the client, or into an answer that is not streamed, or to
            the first finish where no text came before it.
    """

    usage: Usage
    request_id: str
    model: str
    placements: tuple[Placement, ...]
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
    fallback: Fallback = Fallback.UNSPECIFIED
    fallback_reason: str = ""
    first_step_seconds: float = 0.0
    encode_seconds: float = 0.0
    first_token_seconds: float = 0.0
    first_text_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Result:
    """All choices of a request, by index, and its closing."""

    choices: tuple[Choice, ...]
    closing: Closing

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].text if self.choices else ""

    @property
    def usage(self) -> Usage:
        """Tokens of the request."""
        return self.closing.usage


@dataclass(frozen=True, slots=True)
class TokenCount:
    """Tokens of a prompt, and how many prompt and answer may hold together. `token_ids` where they were asked for."""

    count: int
    token_ids: tuple[int, ...]
    context_length: int


@dataclass(frozen=True, slots=True)
class Calibration:
    """How fast an executor is when it has nothing else to do, as it has measured.

    Attributes:
        prefill_tokens_per_second: of a prompt.
        decode_tokens_per_second: of all sequences together, by how many decode.
        prefill_chunk: prompt tokens of a step at most in which other sequences decode.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: Mapping[int, float]
    prefill_chunk: int


@dataclass(frozen=True, slots=True)
class ModelExecutor:
    """One live executor of a model, as it last reported. `features` are what its backend is set up to do beyond generating.

    `role` is both, prefill or decode.
    """

    executor_id: str
    backend: str
    device: str
    dtype: str
    running: int
    waiting: int
    kv_blocks: int
    kv_blocks_free: int
    draining: bool
    backend_version: str = ""
    features: tuple[str, ...] = ()
    kv_layout: str = ""
    kv_dtype: str = ""
    calibration: Calibration | None = None
    role: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is served, since `created`."""

    name: str
    fingerprint: str
    architecture: str
    context_length: int
    vocabulary_size: int
    executors: tuple[ModelExecutor, ...]
    created: datetime


def collect(events: Sequence[Event], closing: Closing) -> Result:
    """The choices that a stream's events amount to."""
    return Result(tuple(_choice(index, events) for index in sorted({event.index for event in events})), closing)


def _choice(index: int, events: Sequence[Event]) -> Choice:
    own = [event for event in events if event.index == index]
    return Choice(
        index,
        text="".join(event.text for event in own),
        token_ids=tuple(i for event in own for i in event.token_ids),
        logprobs=tuple(one for event in own for one in event.logprobs),
        prompt_logprobs=tuple(one for event in own for one in event.prompt_logprobs),
        finish=next((event.finish for event in reversed(own) if event.finish is not None), None),
    )
