"""What each event does in each state of a request and, where it is one of a handoff, at each stage of its choice's handoff."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from penstock.common.tables import by_state
from penstock.gateway.states import Event, Stage, State
from penstock.gateway.transitions.ending import break_off, expire, fail
from penstock.gateway.transitions.handoff import (
    arrive,
    drop_prefill,
    end_prefill,
    end_sequence,
    fail_handoff,
    hand_off,
    recompute,
    send,
)
from penstock.gateway.transitions.placing import announce, decode, give_up, lose, place_again, start
from penstock.gateway.transitions.telling import on_text, reopen

if TYPE_CHECKING:
    from penstock.gateway.choice import Choice
    from penstock.gateway.machine import Request

__all__ = ["STAGES", "TABLE"]

_Transition = Callable[..., None]


def _ignore(request: Request, *facts: Any) -> None:
    """It came too late, or twice."""


def _staged(event: Event) -> _Transition:
    def by_stage(request: Request, choice: Choice, *facts: Any) -> None:
        STAGES[choice.stage, event](request, choice, *facts)

    return by_stage


_reserved = _staged(Event.RESERVED)
_arrived = _staged(Event.ARRIVED)
_handed_off = _staged(Event.HANDED_OFF)
_handoff_failed = _staged(Event.HANDOFF_FAILED)
_prefill_ended = _staged(Event.PREFILL_ENDED)
_prefill_lost = _staged(Event.PREFILL_LOST)

_ROWS: Final[Mapping[Event, tuple[_Transition, ...]]] = {
    # columns: QUEUED, PREFILLING, DECODING, FLUSHING, DONE
    Event.GRANTED: (start, _ignore, _ignore, _ignore, _ignore),
    Event.REFUSED: (give_up, _ignore, _ignore, _ignore, _ignore),
    Event.SCHEDULER_BACK: (place_again, announce, announce, _ignore, _ignore),
    Event.TOKEN: (_ignore, decode, _ignore, _ignore, _ignore),
    Event.SEQUENCE_ENDED: (_ignore, end_sequence, end_sequence, _ignore, _ignore),
    Event.SEQUENCE_LOST: (_ignore, lose, lose, _ignore, _ignore),
    Event.RESERVED: (_ignore, _reserved, _reserved, _ignore, _ignore),
    Event.ARRIVED: (_ignore, _arrived, _arrived, _ignore, _ignore),
    Event.HANDED_OFF: (_ignore, _handed_off, _handed_off, _ignore, _ignore),
    Event.HANDOFF_FAILED: (_ignore, _handoff_failed, _handoff_failed, _ignore, _ignore),
    Event.PREFILL_ENDED: (_ignore, _prefill_ended, _prefill_ended, _ignore, _ignore),
    Event.PREFILL_LOST: (_ignore, _prefill_lost, _prefill_lost, _ignore, _ignore),
    Event.TEXT: (on_text, on_text, on_text, on_text, _ignore),
    Event.TOKENIZER_BACK: (reopen, reopen, reopen, reopen, _ignore),
    Event.CANCEL: (fail, fail, fail, fail, _ignore),
    Event.BREAK_OFF: (break_off, break_off, break_off, break_off, _ignore),
    Event.DEADLINE: (expire, expire, expire, expire, _ignore),
}

_STAGE_ROWS: Final[Mapping[Event, tuple[_Transition, ...]]] = {
    # columns: TOGETHER, RESERVING, SENDING, ARRIVED, ABORTED
    Event.RESERVED: (_ignore, send, _ignore, _ignore, _ignore),
    Event.ARRIVED: (_ignore, _ignore, arrive, arrive, _ignore),
    Event.HANDED_OFF: (_ignore, _ignore, hand_off, hand_off, hand_off),
    Event.HANDOFF_FAILED: (lose, recompute, fail_handoff, recompute, _ignore),
    Event.PREFILL_ENDED: (_ignore, _ignore, end_prefill, end_prefill, end_prefill),
    Event.PREFILL_LOST: (_ignore, _ignore, recompute, drop_prefill, recompute),
}

TABLE: Final[Mapping[tuple[State, Event], _Transition]] = by_state(State, _ROWS)
STAGES: Final[Mapping[tuple[Stage, Event], _Transition]] = by_state(Stage, _STAGE_ROWS)
