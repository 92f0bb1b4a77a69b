"""How sequences, choices and requests end, and what is given back then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.common.errors import DeadlineExceeded, PenstockError
from penstock.gateway.answer import Finish, FinishReason
from penstock.gateway.closing import closing
from penstock.gateway.ports import SequenceEnd
from penstock.gateway.states import State

if TYPE_CHECKING:
    from penstock.gateway.choice import Choice
    from penstock.gateway.machine import Request

__all__ = ["break_off", "end_choice", "end_early", "expire", "fail", "finish", "rest", "stop", "stop_prefill", "tell_first"]


def stop(request: Request, choice: Choice) -> None:
    """Stop what runs of a choice, and forget what was told of it too early."""
    if choice.sequence_id is not None:
        request.execution.abort(choice.sequence_id)
        choice.sequence_id = None
    if choice.apart is not None:
        stop_prefill(request, choice)
        choice.apart = None


def stop_prefill(request: Request, choice: Choice) -> None:
    """The half that prefills is needed no more, or is done."""
    apart = choice.apart
    if apart is None:
        return
    if apart.sequence_id is not None:
        request.execution.abort(apart.sequence_id)
        apart.sequence_id = None
    _give_prefill_back(request)


def _give_prefill_back(request: Request) -> None:
    """The executor that prefills has no work of this request any more."""
    lease = request.lease
    if lease is not None and lease.prefill is not None:
        request.lease = lease.without_prefill()
        request.placement.prefilled(request)


def end_choice(request: Request, choice: Choice, end: SequenceEnd) -> None:
    """The executors are done with a choice: what the tokenizer holds back is asked for."""
    request.record.last_token_at = request.now()
    stop(request, choice)
    choice.ended = end
    request.decoding.finish(choice.decoding_id)


def rest(request: Request) -> None:
    """After a choice has moved on: give back what no choice needs any more."""
    if request.state is State.DONE or request.running:
        return
    request.state = State.FLUSHING
    request.placement.release(request)
    request.lease = None
    if all(choice.finish is not None for choice in request.choices):
        _done(request)
        request.output.close(closing(request))


def finish(request: Request, choice: Choice, how: Finish) -> None:
    """The client is told the end of a choice."""
    choice.finish = how
    tell_first(request)
    stop(request, choice)
    request.decoding.close(choice.decoding_id)
    request.output.finish(choice.index, how)
    if request.record.last_token_at is None:
        request.record.last_token_at = request.now()
    rest(request)


def tell_first(request: Request) -> None:
    """The client is told something now."""
    if request.record.first_text_at is None:
        request.record.first_text_at = request.now()


def expire(request: Request) -> None:
    """The deadline has passed."""
    if not request.told_anything:
        fail(request, DeadlineExceeded("the deadline passed before the first token"))
    else:
        _finish_all(request, FinishReason.DEADLINE)


def break_off(request: Request, error: PenstockError) -> None:
    """The gateway leaves."""
    end_early(request, error, FinishReason.CANCELLED)


def end_early(request: Request, error: PenstockError, reason: FinishReason) -> None:
    """What goes wrong is an error before the first text and a finish reason behind it."""
    if not request.told_anything:
        fail(request, error)
    else:
        request.error = error
        _finish_all(request, reason)


def _finish_all(request: Request, reason: FinishReason) -> None:
    for choice in request.choices:
        if choice.finish is None:
            finish(request, choice, Finish(reason))


def fail(request: Request, error: PenstockError) -> None:
    """There is no answer."""
    request.error = error
    _done(request)
    request.output.fail(error)


def _done(request: Request) -> None:
    """Give everything back."""
    request.placement.release(request)
    request.lease = None
    for choice in request.choices:
        stop(request, choice)
        if choice.finish is None:
            request.decoding.close(choice.decoding_id)
    request.state = State.DONE
    request.on_done(request)
