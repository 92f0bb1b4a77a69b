"""What the scheduler decides about: requests, the executors they run on, and what becomes of them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.common.placement import PlacementReason
from penstock.common.step_times import StepTimes

__all__ = [
    "Description",
    "Failing",
    "Grant",
    "Load",
    "Lost",
    "Needs",
    "Outcome",
    "Prefill",
    "Reason",
    "Refused",
    "Role",
]


class Role(enum.Enum):
    """What an executor is given to do. Each can do all of it."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


# Not frozen: that would cost a tenth of a placement.
@dataclass(slots=True, kw_only=True)
class Needs:
    """What one request needs. `block_hashes` are those of its prompt's full blocks; `deadline` is in seconds from now."""

    model: str
    tokenizer_fingerprint: str = ""
    prompt_tokens: int = 1
    max_tokens: int = 1
    choices: int = 1
    block_hashes: Sequence[int] = ()
    fields: tuple[str, ...] = ()
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    avoid: frozenset[str] = frozenset()
    replacing: bool = False
    traceparent: str = ""
    client_request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What an executor is when it registers; limits in tokens, sequences and KV blocks.

    Attributes:
        model_fingerprint: of the checkpoint; empty where it is not known, and then KV is exchanged with nobody.
        features: what it can do beyond generating, `export_kv` and `import_kv` among it.
        times: of its steps, where measured.
        prefill_chunk: prompt tokens of a step at most in which others decode.
        kv_bytes_per_token: of KV as it leaves this executor.
        role: what it is given to do at first.
    """

    executor_id: str
    address: str
    model: str
    tokenizer_fingerprint: str = ""
    context_length: int
    kv_block_size: int
    kv_blocks: int
    max_batch_size: int
    fields: frozenset[str] = frozenset()
    times: StepTimes | None = None
    model_fingerprint: str = ""
    features: frozenset[str] = frozenset()
    prefill_chunk: int = 0
    kv_bytes_per_token: int = 0
    role: Role = Role.BOTH

    @property
    def kv_tokens(self) -> int:
        """Tokens that its KV cache holds."""
        return self.kv_blocks * self.kv_block_size

    @property
    def sequence_tokens(self) -> int:
        """Tokens that one sequence may hold here."""
        return min(self.context_length, self.kv_tokens)


@dataclass(frozen=True, slots=True)
class Failing:
    """Another executor, with which an executor's last handoffs failed; `sends`: of KV to there, rather than from there."""

    executor_id: str
    sends: bool
    failures: int


@dataclass(frozen=True, slots=True)
class Load:
    """An executor's own report."""

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    prefill_tokens_per_second: float = 0.0
    kv_blocks_free: int = 0
    steps_per_second: float = 0.0
    receiving: int = 0
    sending: int = 0
    handoff_bytes_per_second: float = 0.0
    failing: tuple[Failing, ...] = ()


class Reason(enum.Enum):
    """Why a request gets no executor."""

    QUEUE_FULL = "queue_full"
    DEADLINE = "deadline"
    UNKNOWN_MODEL = "unknown_model"
    UNSUPPORTED = "unsupported"
    NO_EXECUTOR = "no_executor"


@dataclass(slots=True)
class Prefill:
    """The half of a lease that is for prefill alone."""

    executor_id: str
    address: str
    tokens: int
    cached_tokens: int


@dataclass(slots=True)
class Grant:
    """A lease; with `prefill`, on two executors."""

    gateway: int
    request_id: int
    model: str
    executor_id: str
    address: str
    tokens: int
    choices: int
    queued_seconds: float
    cached_tokens: int
    reason: PlacementReason
    prefill: Prefill | None = None
    traceparent: str = ""
    client_request_id: str = ""


@dataclass(slots=True)
class Refused:
    """A request that leaves without a lease. `field` is the public one that is not supported; `retry_after` in seconds."""

    gateway: int
    request_id: int
    model: str
    reason: Reason
    message: str
    field: str = ""
    retry_after: float = 0.0
    queued_seconds: float = 0.0
    traceparent: str = ""
    client_request_id: str = ""


@dataclass(frozen=True, slots=True)
class Lost:
    """An executor whose leases are worth nothing any more, though its streams may stand."""

    executor_id: str
    why: str


Outcome = Grant | Refused | Lost
