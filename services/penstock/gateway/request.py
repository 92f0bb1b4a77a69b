"""What a client asks for, the same behind both doors, before and after defaults are filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Caller", "Generation", "Message", "Plan", "PlannedSampling", "Reporting", "Sampling", "Stopping"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks, since when and until when.

    Attributes:
        request_id: for logs and traces.
        deadline: a time of the monotonic clock.
        arrived: the same; None where nobody noted it.
        traceparent: of the caller's span, or nothing.
    """

    tenant: str
    request_id: str
    deadline: float
    arrived: float | None = None
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """`penstock.v1.Sampling`; None where the client said nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """`penstock.v1.Stopping`."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_text: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Reporting:
    """`penstock.v1.Reporting`."""

    logprobs: int | None = None
    prompt_logprobs: int | None = None
    token_ids: bool = False
    echo: bool = False
    special_tokens: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One prompt to continue. Exactly one of `text`, `token_ids` and `messages` is set in a valid one."""

    model: str = ""
    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Message] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Mapping[str, str | float | bool | None] = field(default_factory=dict)
    sampling: Sampling = field(default_factory=Sampling)
    stopping: Stopping = field(default_factory=Stopping)
    reporting: Reporting = field(default_factory=Reporting)
    n: int = 1
    priority: int = 0
    cache_salt: str = ""

    @property
    def opens_answer(self) -> bool:
        """Whether the opening of an answer stands behind the messages."""
        return not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedSampling:
    """Sampling with nothing left open. Choice `i` of a request draws with ``(seed + i) mod 2**64``."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A validated, encoded request with all defaults filled in: what the state machine runs.

    Attributes:
        prompt_ids: at least one, and with `max_tokens` more it fits into the context.
        stop_ids: token ids that end a choice, the model's end-of-sequence ids included unless they are ignored.
        fields: public fields in use that an executor has to support.
        block_hashes: of the prompt's full blocks, 8 bytes each.
        salt: 16 bytes; cached blocks are shared only under the same salt.
        echo: the prompt's text, to stand before each choice; None where it is not asked for.
        preceding_ids: the last ids of a prompt with whose text the answer goes on; none where it begins a text of its own.
        prompt_only: the client asked for no new token; the one that an executor draws at least is not told.
    """

    model: str
    tokenizer_fingerprint: str
    prompt_ids: Sequence[int]
    sampling: PlannedSampling
    max_tokens: int
    min_tokens: int
    stop: Sequence[str]
    stop_ids: frozenset[int]
    include_stop_text: bool
    reporting: Reporting
    n: int
    priority: int
    fields: Sequence[str]
    block_hashes: bytes
    salt: bytes
    echo: str | None = None
    preceding_ids: Sequence[int] = ()
    prompt_only: bool = False
