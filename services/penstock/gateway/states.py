"""Where a request can be, and what can happen to it."""

from __future__ import annotations

import enum

__all__ = ["Event", "State"]


class State(enum.Enum):
    """Where a request is."""

    QUEUED = "queued"  # a lease is asked for
    PREFILLING = "prefilling"  # sequences are started; none has told a token since
    DECODING = "decoding"  # tokens come
    FLUSHING = "flushing"  # the executor is done; the last texts are awaited
    DONE = "done"  # everything is given back


class Event(enum.Enum):
    """What happens to a request."""

    GRANTED = "granted"
    REFUSED = "refused"
    SCHEDULER_BACK = "scheduler back"  # a new stream to a scheduler that knows nothing of this request
    TOKEN = "token"  # noqa: S105 - a token of text
    SEQUENCE_ENDED = "sequence ended"
    SEQUENCE_LOST = "sequence lost"  # refused or failed, or its executor is gone
    TEXT = "text"
    TOKENIZER_BACK = "tokenizer back"  # a new stream to a tokenizer that knows nothing of this request
    CANCEL = "cancel"
    BREAK_OFF = "break off"
    DEADLINE = "deadline"
