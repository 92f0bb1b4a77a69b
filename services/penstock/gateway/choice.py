"""One choice of a request: the tokens that were drawn, and how much of them the client has been told."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock.gateway.answer import Finish, Logprob, TokenAlternative
from penstock.gateway.ports import PrefillLease, SequenceEnd, SequenceStart, Text, TokenReport
from penstock.gateway.states import Stage

if TYPE_CHECKING:
    from penstock.gateway.machine import Request

__all__ = ["Apart", "Choice", "ids_of"]


@dataclass(slots=True)
class Apart:
    """The half of a choice that prefills on an executor of its own, and what the other half tells before it.

    Two executors are two streams, and nothing orders them: tokens that are drawn behind the first one may be heard before it.

    Attributes:
        first: position of the token that it draws.
        sent: whether it was started.
        sequence_id: while it runs.
        arrived: whether its KV is with the other half.
        aborted: whether the other half is over, because this one has given the handoff up.
        tokens: what the other half told early, from position `first` + 1 on.
        reports: their log-probabilities, by position.
        end: how the other half ended early.
    """

    prefill: PrefillLease
    first: int
    begun_at: float
    sent: bool = False
    sequence_id: int | None = None
    arrived: bool = False
    aborted: bool = False
    tokens: list[int] = field(default_factory=list)
    reports: dict[int, TokenReport] = field(default_factory=dict)
    end: tuple[SequenceEnd, int] | None = None


class Choice:
    """Tokens are kept by position, so that whatever an executor or a tokenizer tells twice is told once.

    Attributes:
        ids: output tokens, a stop token at the end included.
        stop_ids: tokens that end the choice.
        sequence_id: while a sequence of it runs on the executor that decodes.
        apart: the half that prefills, where that runs elsewhere; it stays when that half is done.
        reserve_seconds: how long blocks were waited for where KV was to come.
        ended: how the executor ended it, once it did.
        stop_token: the stop token that ended it; it is not decoded unless stop texts are to be shown.
        finish: once the client was told the last of it.
        begun: whether the client was told the first of it.
        held: texts that wait for the bytes of their tokens.
    """

    __slots__ = (
        "apart",
        "begun",
        "decoding_id",
        "describing",
        "ended",
        "finish",
        "held",
        "ids",
        "index",
        "preemptions",
        "prompt_reports",
        "reports",
        "request",
        "reserve_seconds",
        "sequence_id",
        "shows_stop",
        "start",
        "stop_ids",
        "stop_token",
        "told_bytes",
        "told_tokens",
    )

    def __init__(self, request: Request, index: int, decoding_id: int) -> None:
        self.request = request
        self.index = index
        self.decoding_id = decoding_id
        self.ids: list[int] = []
        self.stop_ids = request.plan.stop_ids
        self.shows_stop = request.plan.include_stop_text
        self.sequence_id: int | None = None
        self.apart: Apart | None = None
        self.reserve_seconds = 0.0
        self.start: SequenceStart | None = None
        self.ended: SequenceEnd | None = None
        self.stop_token: int | None = None
        self.finish: Finish | None = None
        self.preemptions = 0
        self.begun = False
        self.told_bytes = 0
        self.told_tokens = 0
        self.reports: list[TokenReport] = []
        self.prompt_reports: list[TokenReport] | None = None
        self.describing: deque[Sequence[int]] = deque()
        self.held: deque[Text] = deque()

    @property
    def decodable_ids(self) -> list[int]:
        """Tokens that the decoding has to hold by now."""
        return self.ids[:-1] if self.stop_token is not None and not self.shows_stop else self.ids

    @property
    def stage(self) -> Stage:
        """How far its handoff has come. A token behind the first one tells that KV has arrived, too."""
        apart = self.apart
        if apart is None:
            return Stage.TOGETHER
        if apart.aborted:
            return Stage.ABORTED
        if apart.arrived or apart.tokens or len(self.ids) > apart.first + 1:
            return Stage.ARRIVED
        return Stage.SENDING if apart.sent else Stage.RESERVING

    @property
    def first_is_due(self) -> bool:
        """Whether the token that the prefilling half draws has not been heard yet."""
        return self.apart is not None and len(self.ids) == self.apart.first

    def runs(self, sequence_id: int) -> bool:
        """Whether a sequence is one of its own; one that was given up is not."""
        return sequence_id == self.sequence_id or self.prefills(sequence_id)

    def prefills(self, sequence_id: int) -> bool:
        """Whether a sequence is the half of it that prefills."""
        return self.apart is not None and sequence_id == self.apart.sequence_id

    def complete_at(self, max_tokens: int) -> SequenceEnd | None:
        """How a choice has ended whose executor was lost after its last token and before it could say so."""
        if self.stop_token is not None:
            return SequenceEnd.STOP
        return SequenceEnd.LENGTH if len(self.ids) >= max_tokens else None

    def untold(self, text: Text) -> str:
        """The part of a decoded text that the client has not been told, which now counts as told."""
        fresh = text.text
        size = len(fresh) if fresh.isascii() else len(fresh.encode())
        known = self.told_bytes - text.byte_offset
        if known > 0:
            if known >= size:
                return ""
            fresh = fresh.encode()[known:].decode()
        self.told_bytes = text.byte_offset + size
        return fresh

    def logprobs(self, first: int, end: int, tokens: dict[int, bytes]) -> list[Logprob]:
        """Reports of the output tokens in a range, with their bytes."""
        return [_with_bytes(report, tokens) for report in self.reports[first:end]]

    def prompt_logprobs(self, tokens: dict[int, bytes]) -> list[Logprob]:
        """The same for the prompt."""
        return [_with_bytes(report, tokens) for report in self.prompt_reports or ()]


def _with_bytes(report: TokenReport, tokens: dict[int, bytes]) -> Logprob:
    return Logprob(
        report.token_id,
        report.logprob,
        tokens[report.token_id],
        report.rank,
        [TokenAlternative(i, p, tokens[i]) for i, p in zip(report.top_ids, report.top_logprobs, strict=True)],
    )


def ids_of(reports: Iterable[TokenReport]) -> set[int]:
    """All token ids that reports name."""
    named: set[int] = set()
    for report in reports:
        named.add(report.token_id)
        named.update(report.top_ids)
    return named
