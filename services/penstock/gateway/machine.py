"""The state machine that owns a request, from its place in the queue to its last text.

What happens to a request is an `Event`; what an event does in a state stands in one table (`table.py`), and nowhere else. What is
done then is in the rooms of `transitions/`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from penstock.common.errors import PenstockError
from penstock.common.handoff import HandoffFailure
from penstock.gateway.answer import FallbackReason, Handoff
from penstock.gateway.choice import Choice
from penstock.gateway.ports import (
    Lease,
    Loss,
    OutputPort,
    Placing,
    Ports,
    Refusal,
    SequenceEnd,
    SequenceStart,
    Text,
    TokenReport,
)
from penstock.gateway.record import Record
from penstock.gateway.request import Caller, Plan
from penstock.gateway.states import Event, State
from penstock.gateway.table import TABLE
from penstock.gateway.transitions import reports, telling, tokens

__all__ = ["Request"]

_numbers = itertools.count(1)
_decoding_ids = itertools.count(1)


class Request:
    """One prompt and its choices. Every public method is an event, or a fact that moves no state.

    Events of a sequence that was given up are none.

    Args:
        plan: what to run.
        caller: whose it is.
        ports: to the other services.
        output: where the answer goes.
        known_tokens: the bytes of the model's token ids, as far as known; shared by all requests of a tokenizer.
        clock: monotonic seconds.
        max_attempts: executors that are tried without a new token between them.
        on_done: told once, when everything has been given back.

    Attributes:
        attempts_left: placements that may still bring no token.
        record: how it has run so far.
    """

    def __init__(
        self,
        plan: Plan,
        caller: Caller,
        ports: Ports,
        output: OutputPort,
        *,
        known_tokens: dict[int, bytes],
        clock: Callable[[], float],
        max_attempts: int,
        on_done: Callable[[Request], None],
    ) -> None:
        self.number = next(_numbers)
        self.plan = plan
        self.caller = caller
        self.placement, self.execution, self.decoding = ports.placement, ports.execution, ports.decoding
        self.output = output
        self.tokens = known_tokens
        self.now = clock
        self.on_done = on_done
        self.state = State.QUEUED
        self.choices = [Choice(self, i, next(_decoding_ids)) for i in range(plan.n)]
        self.lease: Lease | None = None
        self.error: PenstockError | None = None
        self.attempts_left = self.max_attempts = max_attempts
        now = clock()
        self.record = Record(self.choices, now, now if caller.arrived is None else caller.arrived)

    # What happens

    def begin(self) -> None:
        """Ask for the first place."""
        self.placement.place(self, Placing(replacing=False))

    def granted(self, lease: Lease) -> None:
        self.apply(Event.GRANTED, lease)

    def refused(self, refusal: Refusal) -> None:
        self.apply(Event.REFUSED, refusal)

    def scheduler_back(self) -> None:
        self.apply(Event.SCHEDULER_BACK)

    def token(self, choice: Choice, token_id: int, position: int) -> None:
        """A new token. This is the hot path: only the first token since a placement goes through the table.

        Tokens are ordered by position, whichever executor tells them. One that was told before is dropped.
        """
        if self.state is not State.DECODING and not self._first_token(choice, position):
            return
        ids = choice.ids
        if position != len(ids):
            if position > len(ids):
                tokens.out_of_turn(self, choice, token_id, position)
            return
        if position < 2:
            tokens.begin(self, choice, position)
        ids.append(token_id)
        if token_id in choice.stop_ids:
            choice.stop_token = token_id
            if not choice.shows_stop:
                return
        self.decoding.token(choice.decoding_id, token_id)
        if choice.apart is not None and choice.apart.tokens:
            tokens.tell_early(self, choice)

    def sequence_ended(self, choice: Choice, sequence_id: int, end: SequenceEnd, preemptions: int) -> None:
        if choice.runs(sequence_id):
            event = Event.PREFILL_ENDED if choice.prefills(sequence_id) else Event.SEQUENCE_ENDED
            self.apply(event, choice, end, preemptions)

    def sequence_lost(self, choice: Choice, sequence_id: int, loss: Loss, why: str) -> None:
        if choice.prefills(sequence_id):
            self.apply(Event.PREFILL_LOST, choice, FallbackReason[f"PREFILL_{loss.name}"], why)
        elif choice.runs(sequence_id):
            self.apply(Event.SEQUENCE_LOST, choice, FallbackReason[f"DECODE_{loss.name}"], why)

    def reserved_blocks(self, choice: Choice, sequence_id: int, ticket: bytes) -> None:
        if choice.runs(sequence_id):
            self.apply(Event.RESERVED, choice, ticket)

    def kv_arrived(self, choice: Choice, sequence_id: int, arrival: Handoff) -> None:
        if choice.runs(sequence_id):
            self.apply(Event.ARRIVED, choice, arrival)

    def handed_off(self, choice: Choice, sequence_id: int, preemptions: int) -> None:
        if choice.prefills(sequence_id):
            self.apply(Event.HANDED_OFF, choice, preemptions)

    def handoff_failed(self, choice: Choice, sequence_id: int, failure: HandoffFailure, why: str) -> None:
        if choice.runs(sequence_id):
            event = Event.PREFILL_LOST if choice.prefills(sequence_id) else Event.HANDOFF_FAILED
            self.apply(event, choice, FallbackReason(failure.value), why)

    def text(self, choice: Choice, text: Text) -> None:
        self.apply(Event.TEXT, choice, text)

    def tokenizer_back(self, choice: Choice) -> None:
        self.apply(Event.TOKENIZER_BACK, choice)

    def cancel(self, error: PenstockError) -> None:
        """The answer is not wanted any more, or can not be had; `error` tells whoever still listens."""
        self.apply(Event.CANCEL, error)

    def break_off(self, error: PenstockError) -> None:
        """The answer can not be gone on with; what was told of it stands."""
        self.apply(Event.BREAK_OFF, error)

    def deadline(self) -> None:
        self.apply(Event.DEADLINE)

    # Facts

    def sequence_started(self, choice: Choice, sequence_id: int, start: SequenceStart) -> None:
        """A sequence's first report: of replays the first counts, of two halves the one that prefills."""
        if choice.start is None and (choice.apart is None or choice.prefills(sequence_id)):
            choice.start = start

    def report(self, choice: Choice, position: int, report: TokenReport) -> None:
        """The log-probability of an output token, before or with the token."""
        reports.report(self, choice, position, report)

    def prompt_report(self, choice: Choice, prompt_reports: Sequence[TokenReport]) -> None:
        """Those of the prompt's tokens."""
        reports.prompt_report(self, choice, prompt_reports)

    def described(self, choice: Choice, tokens: Iterable[bytes]) -> None:
        """The bytes of the ids that were asked for first."""
        telling.described(self, choice, tokens)

    @property
    def told_anything(self) -> bool:
        """Whether the client has any of its answer, or its end."""
        return self.record.first_text_at is not None

    # What is done about it

    def apply(self, event: Event, *facts: Any) -> None:
        """Do what the table says."""
        TABLE[self.state, event](self, *facts)

    def _first_token(self, choice: Choice, position: int) -> bool:
        if position == len(choice.ids):
            self.apply(Event.TOKEN, choice)
            return self.state is State.DECODING
        return self.state is State.PREFILLING

    @property
    def running(self) -> list[Choice]:
        """Choices that need an executor."""
        return [c for c in self.choices if c.finish is None and c.ended is None]

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that was described; nothing of any other."""
        return self.tokens.get(token_id, b"")
