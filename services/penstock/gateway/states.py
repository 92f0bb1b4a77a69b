"""Where a request can be, how far a choice has been handed over, and what can happen to both."""

from __future__ import annotations

import enum

__all__ = ["Event", "Stage", "State"]


class State(enum.Enum):
    """Where a request is."""

    QUEUED = "queued"  # a lease is asked for
    PREFILLING = "prefilling"  # sequences are started; none has told a token since
    DECODING = "decoding"  # tokens come
    FLUSHING = "flushing"  # the executor is done; the last texts are awaited
    DONE = "done"  # everything is given back


class Stage(enum.Enum):
    """How far the handoff of a choice has come."""

    TOGETHER = "together"  # there is none
    RESERVING = "reserving"  # the half that decodes is started; its ticket is awaited
    SENDING = "sending"  # both halves are started
    ARRIVED = "arrived"  # the half that decodes needs the other one no more
    ABORTED = "aborted"  # the half that prefills has given the handoff up, and will say why


class Event(enum.Enum):
    """What happens to a request."""

    GRANTED = "granted"
    REFUSED = "refused"
    SCHEDULER_BACK = "scheduler back"  # a new stream to a scheduler that knows nothing of this request
    TOKEN = "token"  # noqa: S105 - a token of text
    SEQUENCE_ENDED = "sequence ended"
    SEQUENCE_LOST = "sequence lost"  # refused or failed, or its executor is gone; of two halves, the one that decodes
    RESERVED = "reserved"  # the half that decodes has its blocks, and a ticket for the other one
    ARRIVED = "arrived"  # the half that decodes has its KV
    HANDED_OFF = "handed off"  # the half that prefills is done
    HANDOFF_FAILED = "handoff failed"  # so the half that decodes says
    PREFILL_ENDED = "prefill ended"  # with the first token, which is the last one too
    PREFILL_LOST = "prefill lost"  # refused or failed, or its executor is gone, or its handoff failed
    TEXT = "text"
    TOKENIZER_BACK = "tokenizer back"  # a new stream to a tokenizer that knows nothing of this request
    CANCEL = "cancel"
    BREAK_OFF = "break off"
    DEADLINE = "deadline"
