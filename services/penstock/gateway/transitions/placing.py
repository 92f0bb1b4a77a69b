"""Where a request runs: leases, and what is done when an executor is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.common.errors import DeadlineExceeded, Unavailable
from penstock.gateway.answer import Fallback, FallbackReason, FinishReason
from penstock.gateway.choice import Apart
from penstock.gateway.ports import Lease, Placing, Refusal
from penstock.gateway.states import State
from penstock.gateway.transitions.ending import end_choice, end_early, expire, rest, stop

if TYPE_CHECKING:
    from penstock.gateway.choice import Choice
    from penstock.gateway.machine import Request

__all__ = ["announce", "decode", "give_up", "lose", "place_again", "replace", "start", "start_together"]


def start(request: Request, lease: Lease) -> None:
    """Start each choice. Where prefill runs apart it is the first one's: the others share its prompt's KV where they decode."""
    now = request.now()
    request.state = State.PREFILLING
    request.lease = lease
    request.record.placements.append((lease.prefill is not None, lease.reason))
    request.record.executor_ids.append(lease.executor_id)
    request.record.decode_executor_id = lease.executor_id
    request.record.scheduler_seconds += lease.queued_seconds
    if request.record.placed_at is None:
        request.record.placed_at = now
    prefill = lease.prefill
    for choice in request.running:
        if prefill is None:
            start_together(request, lease, choice)
        else:
            choice.apart = Apart(prefill, len(choice.ids), now)
            choice.sequence_id = request.execution.receive(lease, prefill, choice)
            prefill = None


def start_together(request: Request, lease: Lease, choice: Choice) -> None:
    """Start a choice, or go on with it, on one executor."""
    if not any(c.apart is not None for c in request.choices):
        request.record.prefill_executor_id = lease.executor_id
    choice.sequence_id = request.execution.start(lease, choice)


def decode(request: Request, choice: Choice) -> None:
    """The first token since a placement."""
    request.state = State.DECODING
    request.attempts_left = request.max_attempts
    request.record.first_token(choice, request.now())


def give_up(request: Request, refusal: Refusal) -> None:
    """The scheduler has no place."""
    if isinstance(refusal.error, DeadlineExceeded):
        expire(request)
    else:
        end_early(request, refusal.error, FinishReason.ERROR)


def place_again(request: Request) -> None:
    """Ask for a lease once more."""
    avoid = tuple(dict.fromkeys(request.record.lost_on))
    failures = request.max_attempts - request.attempts_left
    replayed = max((len(choice.ids) for choice in request.running), default=0)
    placing = Placing(replacing=bool(avoid), avoid=avoid, failures=failures, replayed=replayed)
    request.placement.place(request, placing)


def announce(request: Request) -> None:
    """Tell a restarted scheduler what is held."""
    if request.lease is not None:
        request.placement.announce(request, request.lease)


def lose(request: Request, choice: Choice, reason: FallbackReason, why: str) -> None:  # noqa: ARG001 - all choices run on one executor
    """The executor that decodes, or a sequence on it, is lost."""
    replace(request, reason, why)


def replace(request: Request, reason: FallbackReason, why: str) -> None:
    """Go on elsewhere, behind the last token."""
    if request.lease is not None:
        request.record.lost_on.append(request.lease.executor_id)
    request.placement.release(request)
    request.lease = None
    for choice in request.running:
        stop(request, choice)
        end = choice.complete_at(request.plan.max_tokens)
        if end is not None:
            end_choice(request, choice, end)
    if not request.running:
        rest(request)
    elif request.attempts_left <= 1:
        error = Unavailable("the request was lost on every executor that it was placed on")
        error.add_note(why)
        end_early(request, error, FinishReason.ERROR)
    else:
        request.attempts_left -= 1
        request.record.fallbacks.append((Fallback.REPLACED, reason, request.now()))
        request.state = State.QUEUED
        place_again(request)
