"""One sequence: what was asked, its tokens, and how far it has come."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from collections.abc import Sequence as Listing
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from penstock.common.handoff import HandoffFailure
from penstock.common.prefix import block_hashes, next_block_hash
from penstock.executor.handoff.ticket import Arrival, Receive, Send, Ticket
from penstock.executor.sampling import Adjustment, Row, SamplingParameters, TokenLogprob

__all__ = ["Finish", "Finished", "Frame", "Sequence", "SequenceRequest", "Sink", "Started", "Status"]


class Status(Enum):
    """Where a sequence is in the engine. One that receives or sends holds its blocks, and computes nothing."""

    WAITING = "waiting"
    RUNNING = "running"
    RECEIVING = "receiving"
    SENDING = "sending"
    DONE = "done"


class Finish(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    DEADLINE = "deadline"
    REFUSED = "refused"
    FAILED = "failed"
    HANDED_OFF = "handed_off"
    HANDOFF_FAILED = "handoff_failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceRequest:
    """What one sequence is to do.

    Attributes:
        sequence_id: unique among those of one sink.
        replayed: output that was told before by an executor that was lost; it counts towards `max_tokens`.
        stop_ids: tokens that end the sequence; they are told.
        prompt_logprobs: how many of the likeliest tokens to tell at each place of the prompt; None: tell nothing.
        salt: cached blocks are shared only where this is the same.
        priority: higher goes first among the sequences of one tenant.
        deadline: by `time.monotonic`; None: none.
        handoff: whether its KV comes from, or goes to, another executor; None: neither.
        request_id: sequences of one sink that have the same are choices of one request; empty: of one of its own.
    """

    sequence_id: int
    prompt: Listing[int]
    max_tokens: int
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    replayed: Listing[int] = ()
    min_tokens: int = 0
    stop_ids: Listing[int] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    salt: bytes = b""
    priority: int = 0
    tenant: str = ""
    deadline: float | None = None
    handoff: Receive | Send | None = None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """Told with a sequence's first token, by the engine that draws it.

    Times in seconds: from submission to the first step, and from there to the token.
    """

    sequence_id: int
    cached_tokens: int
    waited: float
    prefill: float


@dataclass(frozen=True, slots=True)
class Finished:
    """Told once. `decode` in seconds, from the first token to the last."""

    sequence_id: int
    reason: Finish
    preemptions: int = 0
    message: str = ""
    decode: float = 0.0
    handoff_failure: HandoffFailure | None = None


@dataclass(slots=True)
class Frame:
    """What one step gave to one sink. The first three are columns; `logprobs` tells (sequence id, position, what)."""

    sequence_ids: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    logprobs: list[tuple[int, int, TokenLogprob]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, list[TokenLogprob]]] = field(default_factory=list)
    reserved: list[tuple[int, Ticket]] = field(default_factory=list)
    arrived: list[tuple[int, Arrival]] = field(default_factory=list)


Sink: TypeAlias = Callable[[Frame], None]


class Sequence:
    """A sequence in the engine.

    It is made in the caller's thread, hashes included, so that the engine's has less to do; then it is the engine's alone.

    Attributes:
        ids: prompt and output. Those before `computed` stand in the KV cache, in the blocks `table[:blocks]`.
        rank: see `Turns`; the least goes first.
        awaits_kv: whether its KV is computed elsewhere, and has not come yet.
        arriving: whether some of that has come.
        sends: whether it ends here with its first token, and is decoded elsewhere.
        handing: whether the handoff knows it, and is to be told of its end.
    """

    __slots__ = (
        "adjustment",
        "arriving",
        "awaits_kv",
        "blocks",
        "cached_tokens",
        "computed",
        "first_step_at",
        "first_token_at",
        "handing",
        "hashes",
        "ids",
        "masked",
        "preemptions",
        "prompt_length",
        "prompt_logprobs",
        "rank",
        "registered",
        "request",
        "row",
        "sends",
        "sink",
        "status",
        "stop_ids",
        "submitted_at",
        "table",
    )

    def __init__(self, request: SequenceRequest, sink: Sink, block_size: int, vocabulary_size: int, submitted_at: float) -> None:
        self.request = request
        self.sink = sink
        self.ids = array("I", request.prompt)
        self.ids.extend(request.replayed)
        self.prompt_length = len(request.prompt)
        self.rank = 0
        self.computed = 0
        self.hashes = block_hashes(self.ids, block_size, request.salt)
        self.registered = 0
        self.table: NDArray[np.int32] = np.zeros(len(self.ids) // block_size + 2, np.int32)
        self.blocks = 0
        self.stop_ids = frozenset(request.stop_ids)
        self.masked = [token for token in self.stop_ids if token < vocabulary_size]
        self.adjustment = (
            Adjustment(request.sampling, request.prompt, request.replayed) if Adjustment.needed(request.sampling) else None
        )
        self.row = Row(request.sampling, 0, self.adjustment, (), request.logprobs)
        self.awaits_kv = isinstance(request.handoff, Receive)
        self.arriving = False
        self.sends = isinstance(request.handoff, Send)
        self.handing = False
        # Of a prompt that is computed elsewhere they are told there.
        asked = request.prompt_logprobs is not None and not request.replayed and not self.awaits_kv
        self.prompt_logprobs: list[TokenLogprob] | None = [] if asked else None
        self.submitted_at = submitted_at
        self.first_step_at = 0.0
        self.first_token_at = 0.0
        self.cached_tokens = 0
        self.preemptions = 0
        self.status = Status.WAITING

    @property
    def remaining(self) -> int:
        """Tokens that are still to be computed before the next one can be drawn: 1 while decoding."""
        return len(self.ids) - self.computed

    @property
    def fresh_hashes(self) -> list[bytes]:
        """Of its full blocks that can not be shared yet."""
        return self.hashes[self.registered :]

    @property
    def output_length(self) -> int:
        return len(self.ids) - self.prompt_length

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether places of the prompt are still to be told of."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_length - 1

    def next_row(self) -> Row:
        """What to draw next."""
        row = self.row
        row.position = position = len(self.ids) - self.prompt_length
        if self.request.min_tokens:
            row.masked = self.masked if position < self.request.min_tokens else ()
        return row

    def append(self, token: int, block_size: int) -> Finish | None:
        """Add an output token; tell whether it ends the sequence."""
        self.ids.append(token)
        if self.adjustment is not None:
            self.adjustment.count(token)
        if len(self.ids) % block_size == 0:
            parent = self.hashes[-1] if self.hashes else self.request.salt
            self.hashes.append(next_block_hash(parent, self.ids[-block_size:]))
        if token in self.stop_ids:
            return Finish.STOP
        return Finish.LENGTH if self.output_length >= self.request.max_tokens else None

    def hold(self, blocks: Listing[int]) -> None:
        """Use more blocks, behind those that it has."""
        end = self.blocks + len(blocks)
        if end > len(self.table):
            self.table = np.resize(self.table, max(end, 2 * len(self.table)))
        self.table[self.blocks : end] = blocks
        self.blocks = end
