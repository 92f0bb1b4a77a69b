"""Tokens that are not simply the next one of a choice that decodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.gateway.answer import FallbackReason
from penstock.gateway.states import Event

if TYPE_CHECKING:
    from penstock.gateway.choice import Choice
    from penstock.gateway.machine import Request

__all__ = ["begin", "out_of_turn", "tell_early"]


def begin(request: Request, choice: Choice, position: int) -> None:
    """A choice's first token is here, or its second."""
    if position == 0:
        request.decoding.open(choice)
    elif request.record.second_token_at is None:
        request.record.second_token_at = request.now()


def out_of_turn(request: Request, choice: Choice, token_id: int, position: int) -> None:
    """A token with a gap before it: it follows one that another executor is to tell, or is a defect."""
    apart = choice.apart
    due = apart.first + 1 + len(apart.tokens) if apart is not None and choice.first_is_due else len(choice.ids)
    if apart is None or position > due or not choice.first_is_due:
        why = f"token {position} came where {due} was due"
        request.apply(Event.SEQUENCE_LOST, choice, FallbackReason.DECODE_FAILED, why)
    elif position == due:
        apart.tokens.append(token_id)


def tell_early(request: Request, choice: Choice) -> None:
    """The first token of a choice that runs apart is here at last, and with it what was told behind it."""
    apart = choice.apart
    if apart is None or choice.first_is_due:
        return
    early, apart.tokens = apart.tokens, []
    for position, token_id in enumerate(early, apart.first + 1):
        request.token(choice, token_id, position)
    if apart.end is not None:
        request.apply(Event.SEQUENCE_ENDED, choice, *apart.end)
