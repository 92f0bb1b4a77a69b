"""A choice whose prefill runs apart: two sequences on two executors, of which the half that decodes is the one that counts.

The executors keep each other's leases and hand the KV over; whatever goes wrong between them ends a sequence, and what is done then
is decided here alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.gateway.answer import Fallback, FallbackReason, Handoff
from penstock.gateway.ports import SequenceEnd
from penstock.gateway.states import Stage
from penstock.gateway.transitions.ending import end_choice, expire, rest, stop, stop_prefill
from penstock.gateway.transitions.placing import replace, start_together

if TYPE_CHECKING:
    from penstock.gateway.choice import Choice
    from penstock.gateway.machine import Request

__all__ = ["arrive", "drop_prefill", "end_prefill", "end_sequence", "fail_handoff", "hand_off", "recompute", "send"]

_UNTOLD = "the half that prefills ended without a token"


def send(request: Request, choice: Choice, ticket: bytes) -> None:
    """There is room for the KV: start the half that prefills."""
    apart, now = choice.apart, request.now()
    if apart is None:
        return
    choice.reserve_seconds = now - apart.begun_at
    request.record.reserved.append((apart.begun_at, now))
    request.record.executor_ids.append(apart.prefill.executor_id)
    request.record.prefill_executor_id = apart.prefill.executor_id
    apart.sent = True
    apart.sequence_id = request.execution.send(apart.prefill, ticket, choice)


def arrive(request: Request, choice: Choice, arrival: Handoff) -> None:
    """The half that decodes has its KV."""
    if choice.apart is not None and not choice.apart.arrived:
        choice.apart.arrived = True
        request.record.arrivals.append((request.now(), arrival))


def hand_off(request: Request, choice: Choice, preemptions: int) -> None:
    """The half that prefills is done."""
    choice.preemptions += preemptions
    drop_prefill(request, choice, FallbackReason.PREFILL_FAILED, _UNTOLD)


def drop_prefill(request: Request, choice: Choice, reason: FallbackReason, why: str) -> None:
    """The half that prefills is not needed any more, unless nobody has told the token that it drew, or nobody decodes behind it."""
    if choice.first_is_due or choice.stage is Stage.ABORTED:
        recompute(request, choice, reason, why)
        return
    stop_prefill(request, choice)


def fail_handoff(request: Request, choice: Choice, reason: FallbackReason, why: str) -> None:
    """The half that decodes gets no KV. Where the other one has given the handoff up, its own word is awaited: it knows why.

    That half has failed, or belongs to an older executor, which says no more of a sequence that is complete with its first token.
    """
    apart, complete = choice.apart, choice.complete_at(request.plan.max_tokens) is not None
    if apart is None or apart.sequence_id is None or complete or reason is not FallbackReason.ABORTED:
        recompute(request, choice, reason, why)
        return
    apart.aborted = True
    choice.sequence_id = None


def recompute(request: Request, choice: Choice, reason: FallbackReason, why: str) -> None:  # noqa: ARG001 - the adapter logs why
    """Let the executor that decodes compute all of it, behind the last token that was told."""
    if choice.apart is not None and reason in _OF_PREFILL:
        request.record.lost_on.append(choice.apart.prefill.executor_id)
    stop(request, choice)
    end = choice.complete_at(request.plan.max_tokens)
    if end is not None:
        end_choice(request, choice, end)
        rest(request)
    elif request.lease is not None:
        request.record.fallbacks.append((Fallback.RECOMPUTE_ON_DECODE, reason, request.now()))
        start_together(request, request.lease, choice)


_OF_PREFILL = (FallbackReason.PREFILL_LOST, FallbackReason.PREFILL_REFUSED, FallbackReason.PREFILL_FAILED)


def end_prefill(request: Request, choice: Choice, end: SequenceEnd, preemptions: int) -> None:
    """The first token is the last one too: there is nothing to decode."""
    choice.preemptions += preemptions
    if end is SequenceEnd.DEADLINE:
        expire(request)
    elif choice.first_is_due:
        recompute(request, choice, FallbackReason.PREFILL_FAILED, _UNTOLD)
    else:
        end_choice(request, choice, end)
        rest(request)


def end_sequence(request: Request, choice: Choice, end: SequenceEnd, preemptions: int) -> None:
    """The executor that decodes has drawn the last token."""
    apart = choice.apart
    if end is SequenceEnd.DEADLINE:
        choice.preemptions += preemptions
        expire(request)
    elif apart is not None and apart.tokens:
        apart.end = end, preemptions  # the token that the other half has drawn is still on its way
    else:
        choice.preemptions += preemptions
        if not choice.ids or choice.first_is_due:
            replace(request, FallbackReason.DECODE_FAILED, "a sequence ended without a token")
        else:
            end_choice(request, choice, end)
            rest(request)
