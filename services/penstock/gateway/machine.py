"""The state machine that owns a request, from its place in the queue to its last text.

What happens to a request is an `Event`; what an event does in a state stands in one table at the end, and nowhere else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final

from penstock.common.errors import DeadlineExceeded, InternalError, PenstockError, Unavailable
from penstock.gateway.answer import Closing, Finish, FinishReason
from penstock.gateway.choice import Choice, ids_of
from penstock.gateway.ports import (
    Decoding,
    Execution,
    Lease,
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

__all__ = ["TABLE", "Request"]

_numbers = itertools.count(1)
_decoding_ids = itertools.count(1)


_Row = tuple[Callable[..., None], ...]

_FINISH = {
    SequenceEnd.STOP: FinishReason.STOP,
    SequenceEnd.LENGTH: FinishReason.LENGTH,
    SequenceEnd.DEADLINE: FinishReason.DEADLINE,
}


class Request:
    """One prompt and its choices. Every public method is an event, or a fact that moves no state.

    Args:
        plan: what to run.
        caller: whose it is.
        ports: placement, execution and decoding.
        output: where the answer goes.
        tokens: the bytes of the model's token ids, as far as known; shared by all requests of a tokenizer.
        clock: monotonic seconds.
        max_attempts: executors that are tried without a new token between them.
        on_done: told once, when everything has been given back.
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
        self.state = State.QUEUED
        self.choices = [Choice(self, i, next(_decoding_ids)) for i in range(plan.n)]
        self.lease: Lease | None = None
        self.error: PenstockError | None = None
        self.executor_ids: list[str] = []
        self.replacements = 0
        self.begun = clock()
        self.arrived = self.begun if caller.arrived is None else caller.arrived
        self.placed_at: float | None = None
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self._placement, self._execution, self._decoding = ports
        self._output = output
        self._tokens = tokens
        self._clock = clock
        self._attempts_left = self._max_attempts = max_attempts
        self._on_done = on_done
        self._told = False
        self._queued_seconds = 0.0

    # What happens

    def begin(self) -> None:
        """Ask for the first place."""
        self._placement.place(self, Placing(replacing=False))

    def granted(self, lease: Lease) -> None:
        self._apply(Event.GRANTED, lease)

    def refused(self, refusal: Refusal) -> None:
        self._apply(Event.REFUSED, refusal)

    def scheduler_back(self) -> None:
        self._apply(Event.SCHEDULER_BACK)

    def token(self, choice: Choice, token_id: int, position: int) -> None:
        """A new token. This is the hot path: only the first token since a placement goes through the table."""
        if self.state is not State.DECODING and not self._first_token():
            return
        ids = choice.ids
        if position != len(ids):
            if position > len(ids):
                self._apply(Event.SEQUENCE_LOST, f"token {position} came where {len(ids)} was due")
            return
        if position == 0:
            self._decoding.open(choice)
        ids.append(token_id)
        if token_id in choice.stop_ids:
            choice.stop_token = token_id
            if not choice.shows_stop:
                return
        self._decoding.token(choice.decoding_id, token_id)

    def sequence_ended(self, choice: Choice, end: SequenceEnd, preemptions: int) -> None:
        self._apply(Event.SEQUENCE_ENDED, choice, end, preemptions)

    def sequence_lost(self, why: str) -> None:
        self._apply(Event.SEQUENCE_LOST, why)

    def text(self, choice: Choice, text: Text) -> None:
        self._apply(Event.TEXT, choice, text)

    def tokenizer_back(self, choice: Choice) -> None:
        self._apply(Event.TOKENIZER_BACK, choice)

    def cancel(self, error: PenstockError) -> None:
        """The answer is not wanted any more, or can not be had; `error` tells whoever still listens."""
        self._apply(Event.CANCEL, error)

    def break_off(self, error: PenstockError) -> None:
        """The answer can not be gone on with; what was told of it stands."""
        self._apply(Event.BREAK_OFF, error)

    def deadline(self) -> None:
        self._apply(Event.DEADLINE)

    # Facts

    def sequence_started(self, choice: Choice, start: SequenceStart) -> None:
        """A sequence's first report; of replays only the first counts."""
        if choice.start is None:
            choice.start = start

    def report(self, choice: Choice, position: int, report: TokenReport) -> None:
        """The log-probability of an output token, before or with the token."""
        if position == len(choice.reports):
            choice.reports.append(report)
            self._describe(choice, ids_of((report,)))

    def prompt_report(self, choice: Choice, reports: Sequence[TokenReport]) -> None:
        """Those of the prompt's tokens."""
        if choice.prompt_reports is None:
            choice.prompt_reports = list(reports)
            self._describe(choice, self._prompt_ids_of(reports))

    def described(self, choice: Choice, tokens: Iterable[bytes]) -> None:
        """The bytes of the ids that were asked for first."""
        if choice.describing:
            self._tokens.update(zip(choice.describing.popleft(), tokens, strict=False))
        self._tell_held(choice)

    # What is done about it

    def _apply(self, event: Event, *facts: Any) -> None:
        TABLE[self.state, event](self, *facts)

    def _first_token(self) -> bool:
        self._apply(Event.TOKEN)
        return self.state is State.DECODING

    def _decode(self) -> None:
        self.state = State.DECODING
        self._attempts_left = self._max_attempts
        if self.first_token_at is None:
            self.first_token_at = self._clock()

    def _start(self, lease: Lease) -> None:
        self.state = State.PREFILLING
        self.lease = lease
        self.executor_ids.append(lease.executor_id)
        self._queued_seconds += lease.queued_seconds
        if self.placed_at is None:
            self.placed_at = self._clock()
        for choice in self._running():
            choice.sequence_id = self._execution.start(lease, choice)

    def _give_up(self, refusal: Refusal) -> None:
        if isinstance(refusal.error, DeadlineExceeded):
            self._expire()
        else:
            self._end_early(refusal.error, FinishReason.ERROR)

    def _place_again(self) -> None:
        avoid = tuple(dict.fromkeys(self.executor_ids))
        failures = self._max_attempts - self._attempts_left
        self._placement.place(self, Placing(replacing=bool(avoid), avoid=avoid, failures=failures))

    def _announce(self) -> None:
        if self.lease is not None:
            self._placement.announce(self, self.lease)

    def _end_sequence(self, choice: Choice, end: SequenceEnd, preemptions: int) -> None:
        choice.preemptions += preemptions
        if end is SequenceEnd.DEADLINE:
            self._expire()
        elif not choice.ids:
            self._replace("a sequence ended without a token")
        else:
            self._end_choice(choice, end)
            self._rest()

    def _end_choice(self, choice: Choice, end: SequenceEnd) -> None:
        """The executor is done with a choice: what the tokenizer holds back is asked for."""
        self.last_token_at = self._clock()
        choice.sequence_id = None
        choice.ended = end
        self._decoding.finish(choice.decoding_id)

    def _replace(self, why: str) -> None:
        """The executor, or one of the request's sequences on it, is lost: go on elsewhere, behind the last token."""
        self._stop_sequences()
        self._placement.release(self)
        self.lease = None
        for choice in self._running():
            end = choice.complete_at(self.plan.max_tokens)
            if end is not None:
                self._end_choice(choice, end)
        if not self._running():
            self._rest()
        elif self._attempts_left <= 1:
            error = Unavailable("the request was lost on every executor that it was placed on")
            error.add_note(why)
            self._end_early(error, FinishReason.ERROR)
        else:
            self._attempts_left -= 1
            self.replacements += 1
            self.state = State.QUEUED
            self._place_again()

    def _rest(self) -> None:
        """After a choice has moved on: give back what no choice needs any more."""
        if self.state is State.DONE or self._running():
            return
        self.state = State.FLUSHING
        self._placement.release(self)
        self.lease = None
        if all(choice.finish is not None for choice in self.choices):
            self._done()
            self._output.close(self._closing())

    def _on_text(self, choice: Choice, text: Text) -> None:
        if choice.finish is not None:
            return
        choice.held.append(text)
        self._tell_held(choice)

    def _tell_held(self, choice: Choice) -> None:
        while choice.held and choice.finish is None and not self._missing(choice, choice.held[0]):
            self._tell(choice, choice.held.popleft())

    def _missing(self, choice: Choice, text: Text) -> bool:
        """Whether bytes of tokens that are told with a text are not known yet."""
        told = choice.prompt_reports if not choice.begun else None
        if told is not None and not self._tokens.keys() >= self._prompt_ids_of(told):
            return True
        return bool(choice.reports) and not self._knows(choice.reports[choice.told_tokens : self._told_after(choice, text)])

    def _knows(self, reports: Iterable[TokenReport]) -> bool:
        return self._tokens.keys() >= ids_of(reports)

    def _told_after(self, choice: Choice, text: Text) -> int:
        """Tokens that are told once a text is; a stop token that was not decoded counts with the last text."""
        return len(choice.ids) if text.last and text.stop_index is None else max(text.tokens, choice.told_tokens)

    def _tell(self, choice: Choice, text: Text) -> None:
        if text.byte_offset > choice.told_bytes:
            self._fail(InternalError(f"text at byte {text.byte_offset} came where {choice.told_bytes} was due"))
            return
        fresh = choice.untold(text)
        first, end = choice.told_tokens, self._told_after(choice, text)
        if not choice.begun:
            self._begin_choice(choice)
        if self.plan.prompt_only:
            self._finish(choice, Finish(FinishReason.LENGTH))
            return
        choice.told_tokens = end
        reporting = self.plan.reporting
        ids = choice.ids[first:end] if reporting.token_ids else ()
        logprobs = choice.logprobs(first, end, self._tokens) if reporting.logprobs is not None else ()
        if fresh or ids or logprobs:
            self._told = True
            self._output.text(choice.index, fresh, ids, logprobs)
        if text.last:
            self._finish(choice, _finish_of(choice, text, self.plan.stop))

    def _begin_choice(self, choice: Choice) -> None:
        """What stands before a choice's first text."""
        choice.begun = True
        if choice.prompt_reports is not None:
            self._output.prompt(choice.index, choice.prompt_logprobs(self._tokens))
        if self.plan.echo:
            self._output.text(choice.index, self.plan.echo, (), ())

    def _finish(self, choice: Choice, finish: Finish) -> None:
        choice.finish = finish
        self._told = True
        if choice.sequence_id is not None:
            self._execution.abort(choice.sequence_id)
            choice.sequence_id = None
        self._decoding.close(choice.decoding_id)
        self._output.finish(choice.index, finish)
        if self.last_token_at is None:
            self.last_token_at = self._clock()
        self._rest()

    def _reopen(self, choice: Choice) -> None:
        """A new tokenizer stream: decode from the first token again; what was told before is dropped by its offset."""
        choice.describing.clear()
        choice.held.clear()
        self._decoding.open(choice)
        if choice.ended is not None:
            self._decoding.finish(choice.decoding_id)
        self._describe(choice, ids_of(choice.reports[choice.told_tokens :]))
        if choice.prompt_reports is not None and not choice.begun:
            self._describe(choice, self._prompt_ids_of(choice.prompt_reports))

    def _prompt_ids_of(self, reports: Iterable[TokenReport]) -> set[int]:
        """Ids that reports of the prompt name, and its first one, of which nothing is known but its text."""
        return {self.plan.prompt_ids[0]} | ids_of(reports)

    def _describe(self, choice: Choice, ids: set[int]) -> None:
        unknown = [i for i in ids if i not in self._tokens]
        if unknown:
            choice.describing.append(unknown)
            self._decoding.describe(choice, unknown)

    def _expire(self) -> None:
        if not self._told:
            self._fail(DeadlineExceeded("the deadline passed before the first token"))
        else:
            self._finish_all(FinishReason.DEADLINE)

    def _break_off(self, error: PenstockError) -> None:
        self._end_early(error, FinishReason.CANCELLED)

    def _end_early(self, error: PenstockError, reason: FinishReason) -> None:
        """What goes wrong is an error before the first text and a finish reason behind it."""
        if not self._told:
            self._fail(error)
        else:
            self.error = error
            self._finish_all(reason)

    def _finish_all(self, reason: FinishReason) -> None:
        for choice in self.choices:
            if choice.finish is None:
                self._finish(choice, Finish(reason))

    def _fail(self, error: PenstockError) -> None:
        self.error = error
        self._done()
        self._output.fail(error)

    def _done(self) -> None:
        """Give everything back."""
        self._stop_sequences()
        self._placement.release(self)
        self.lease = None
        for choice in self.choices:
            if choice.finish is None:
                self._decoding.close(choice.decoding_id)
        self.state = State.DONE
        self._on_done(self)

    def _stop_sequences(self) -> None:
        for choice in self.choices:
            if choice.sequence_id is not None:
                self._execution.abort(choice.sequence_id)
                choice.sequence_id = None

    def _running(self) -> list[Choice]:
        """Choices that need an executor."""
        return [c for c in self.choices if c.finish is None and c.ended is None]

    def _ignore(self, *_facts: Any) -> None:
        """It came too late, or twice."""

    @property
    def queue_seconds(self) -> float:
        """Time at the scheduler, and at the executor before the first step."""
        return self._queued_seconds + max((c.start.waited_seconds for c in self.choices if c.start is not None), default=0.0)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that the first of its choices found in a prefix cache; the prompt counts once, too."""
        return next((c.start.cached_tokens for c in self.choices if c.start is not None), 0)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token that was described; nothing of any other."""
        return self._tokens.get(token_id, b"")

    def now(self) -> float:
        """The request's clock."""
        return self._clock()

    def _closing(self) -> Closing:
        now = self._clock()
        starts = [c.start for c in self.choices if c.start is not None]
        first, last = self.first_token_at or now, self.last_token_at or now
        return Closing(
            prompt_tokens=len(self.plan.prompt_ids),
            completion_tokens=sum(c.told_tokens for c in self.choices),
            cached_tokens=self.cached_tokens,
            executor_ids=tuple(self.executor_ids),
            queue_seconds=self.queue_seconds,
            prefill_seconds=max((s.prefill_seconds for s in starts), default=0.0),
            decode_seconds=max(0.0, last - first),
            total_seconds=now - self.arrived,
            replacements=self.replacements,
            preemptions=sum(c.preemptions for c in self.choices),
            seed=self.plan.sampling.seed,
        )

    ROWS: ClassVar[Mapping[Event, _Row]] = {
        # columns: QUEUED, PREFILLING, DECODING, FLUSHING, DONE
        Event.GRANTED: (_start, _ignore, _ignore, _ignore, _ignore),
        Event.REFUSED: (_give_up, _ignore, _ignore, _ignore, _ignore),
        Event.SCHEDULER_BACK: (_place_again, _announce, _announce, _ignore, _ignore),
        Event.TOKEN: (_ignore, _decode, _ignore, _ignore, _ignore),
        Event.SEQUENCE_ENDED: (_ignore, _end_sequence, _end_sequence, _ignore, _ignore),
        Event.SEQUENCE_LOST: (_ignore, _replace, _replace, _ignore, _ignore),
        Event.TEXT: (_on_text, _on_text, _on_text, _on_text, _ignore),
        Event.TOKENIZER_BACK: (_reopen, _reopen, _reopen, _reopen, _ignore),
        Event.CANCEL: (_fail, _fail, _fail, _fail, _ignore),
        Event.BREAK_OFF: (_break_off, _break_off, _break_off, _break_off, _ignore),
        Event.DEADLINE: (_expire, _expire, _expire, _expire, _ignore),
    }


def _finish_of(choice: Choice, text: Text, stop: Sequence[str]) -> Finish:
    if text.stop_index is not None:
        return Finish(FinishReason.STOP_SEQUENCE, stop_text=stop[text.stop_index])
    reason = _FINISH[choice.ended] if choice.ended is not None else FinishReason.LENGTH
    return Finish(reason, stop_token_id=choice.stop_token if reason is FinishReason.STOP else None)


TABLE: Final[Mapping[tuple[State, Event], Callable[..., None]]] = {
    (state, event): row[column] for event, row in Request.ROWS.items() for column, state in enumerate(State)
}
