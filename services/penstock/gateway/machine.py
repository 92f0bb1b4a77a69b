"""The state machine that owns a request, from its place in the queue to its last text.

What happens to a request is an `Event`; what an event does in a state stands in one table (`table.py`), and nowhere else. What is
done then is in the rooms of `transitions/`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from penstock.common.errors import PenstockError
from penstock.gateway.answer import Fallback, FallbackReason, PlacementReason
from penstock.gateway.choice import Choice
from penstock.gateway.ports import (
    Arrival,
    Decoding,
    Execution,
    HandoffFailure,
    Lease,
    Loss,
    Output,
    Placement,
    Placing,
    Refusal,
    SequenceEnd,
    SequenceStart,
    Text,
    TokenReport,
)
from penstock.gateway.request import Caller, Plan
from penstock.gateway.states import Event, State
from penstock.gateway.table import TABLE
from penstock.gateway.transitions import reports, telling

__all__ = ["Request"]

_numbers = itertools.count(1)
_decoding_ids = itertools.count(1)

_LOST_DECODE = {
    Loss.LOST: FallbackReason.DECODE_LOST,
    Loss.REFUSED: FallbackReason.DECODE_REFUSED,
    Loss.FAILED: FallbackReason.DECODE_FAILED,
}
_LOST_PREFILL = {
    Loss.LOST: FallbackReason.PREFILL_LOST,
    Loss.REFUSED: FallbackReason.PREFILL_REFUSED,
    Loss.FAILED: FallbackReason.PREFILL_FAILED,
}


class Request:
    """One prompt and its choices. Every public method is an event, or a fact that moves no state.

    Events of a sequence that was given up are none.

    Args:
        plan: what to run.
        caller: whose it is.
        ports: placement, execution and decoding.
        output: where the answer goes.
        tokens: the bytes of the model's token ids, as far as known; shared by all requests of a tokenizer.
        clock: monotonic seconds.
        max_attempts: executors that are tried without a new token between them.
        on_done: told once, when everything has been given back.

    Attributes:
        told: whether the client was told anything.
        executor_ids: where it ran, in the order of the starts.
        lost_on: executors that it was lost on.
        placements: whether each lease was for a prefill apart, and why or why not.
        fallbacks: what was done about losses, why, and when.
        arrivals: of KV, with the time of each.
        reserved: from when to when blocks for KV were waited for.
    """

    def __init__(
        self,
        plan: Plan,
        caller: Caller,
        ports: tuple[Placement, Execution, Decoding],
        output: Output,
        *,
        tokens: dict[int, bytes],
        clock: Callable[[], float],
        max_attempts: int,
        on_done: Callable[[Request], None],
    ) -> None:
        self.number = next(_numbers)
        self.plan = plan
        self.caller = caller
        self.placement, self.execution, self.decoding = ports
        self.output = output
        self.tokens = tokens
        self.now = clock
        self.on_done = on_done
        self.state = State.QUEUED
        self.choices = [Choice(self, i, next(_decoding_ids)) for i in range(plan.n)]
        self.lease: Lease | None = None
        self.error: PenstockError | None = None
        self.told = False
        self.attempts_left = self.max_attempts = max_attempts
        self._note_times(clock())
        self._note_places()

    def _note_times(self, now: float) -> None:
        self.begun = now
        self.arrived = now if self.caller.arrived is None else self.caller.arrived
        self.placed_at: float | None = None
        self.first_token_at: float | None = None
        self.second_token_at: float | None = None
        self.last_token_at: float | None = None
        self.scheduler_seconds = 0.0
        self.reserved: list[tuple[float, float]] = []
        self.arrivals: list[tuple[float, Arrival]] = []

    def _note_places(self) -> None:
        self.executor_ids: list[str] = []
        self.lost_on: list[str] = []
        self.prefill_executor_id = ""
        self.decode_executor_id = ""
        self.replacements = 0
        self.placements: list[tuple[bool, PlacementReason]] = []
        self.fallbacks: list[tuple[Fallback, FallbackReason, float]] = []

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
                self._out_of_turn(choice, token_id, position)
            return
        if position < 2:
            self._open(choice, position)
        ids.append(token_id)
        if token_id in choice.stop_ids:
            choice.stop_token = token_id
            if not choice.shows_stop:
                return
        self.decoding.token(choice.decoding_id, token_id)
        if choice.apart is not None and choice.apart.tokens:
            self._tell_early(choice)

    def sequence_ended(self, choice: Choice, sequence_id: int, end: SequenceEnd, preemptions: int) -> None:
        if choice.runs(sequence_id):
            event = Event.PREFILL_ENDED if choice.prefills(sequence_id) else Event.SEQUENCE_ENDED
            self.apply(event, choice, end, preemptions)

    def sequence_lost(self, choice: Choice, sequence_id: int, loss: Loss, why: str) -> None:
        if choice.prefills(sequence_id):
            self.apply(Event.PREFILL_LOST, choice, _LOST_PREFILL[loss], why)
        elif choice.runs(sequence_id):
            self.apply(Event.SEQUENCE_LOST, choice, _LOST_DECODE[loss], why)

    def reserved_blocks(self, choice: Choice, sequence_id: int, ticket: bytes) -> None:
        if choice.runs(sequence_id):
            self.apply(Event.RESERVED, choice, ticket)

    def kv_arrived(self, choice: Choice, sequence_id: int, arrival: Arrival) -> None:
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

    def prompt_report(self, choice: Choice, told: Sequence[TokenReport]) -> None:
        """Those of the prompt's tokens."""
        reports.prompt_report(self, choice, told)

    def described(self, choice: Choice, tokens: Iterable[bytes]) -> None:
        """The bytes of the ids that were asked for first."""
        telling.described(self, choice, tokens)

    # What is done about it

    def apply(self, event: Event, *facts: Any) -> None:
        """Do what the table says."""
        TABLE[self.state, event](self, *facts)

    def _first_token(self, choice: Choice, position: int) -> bool:
        if position == len(choice.ids):
            self.apply(Event.TOKEN)
            return self.state is State.DECODING
        return self.state is State.PREFILLING

    def _out_of_turn(self, choice: Choice, token_id: int, position: int) -> None:
        """A token with a gap before it: of one that another executor tells, or a defect."""
        apart = choice.apart
        if apart is None or not choice.first_is_due or position > apart.first + 1 + len(apart.tokens):
            why = f"token {position} came where {len(choice.ids)} was due"
            self.apply(Event.SEQUENCE_LOST, choice, FallbackReason.DECODE_FAILED, why)
        elif position == apart.first + 1 + len(apart.tokens):
            apart.tokens.append(token_id)

    def _open(self, choice: Choice, position: int) -> None:
        if position == 0:
            self.decoding.open(choice)
        elif self.second_token_at is None:
            self.second_token_at = self.now()

    def _tell_early(self, choice: Choice) -> None:
        """The first token of a choice that was handed over is here at last, and with it what was told behind it."""
        apart = choice.apart
        if apart is None or choice.first_is_due:
            return
        early, apart.tokens = apart.tokens, []
        for position, token_id in enumerate(early, apart.first + 1):
            self.token(choice, token_id, position)
        if apart.end is not None:
            self.apply(Event.SEQUENCE_ENDED, choice, *apart.end)

    @property
    def running(self) -> list[Choice]:
        """Choices that need an executor."""
        return [c for c in self.choices if c.finish is None and c.ended is None]

    @property
    def queue_seconds(self) -> float:
        """Time at the scheduler, for the blocks of a handoff, and at the executor before the first step."""
        return self.scheduler_seconds + max(
            (c.reserve_seconds + c.start.waited_seconds for c in self.choices if c.start is not None), default=0.0
        )

    @property
    def prefill_seconds(self) -> float:
        """The longest of the choices' prefills."""
        return max((c.start.prefill_seconds for c in self.choices if c.start is not None), default=0.0)

    @property
    def first_step_seconds(self) -> float | None:
        """From the first token to the second; None before that."""
        if self.first_token_at is None or self.second_token_at is None:
            return None
        return self.second_token_at - self.first_token_at

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the first of its choices found in a prefix cache; the prompt counts once, too."""
        return next((c.start.cached_tokens for c in self.choices if c.start is not None), 0)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that was described; nothing of any other."""
        return self.tokens.get(token_id, b"")
