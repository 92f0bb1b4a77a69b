"""One log line for each request that a door has answered: what was asked, how it ended, and where its time went."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from penstock.common.errors import InternalError, PenstockError
from penstock.common.logs import logger
from penstock.gateway.choice import Choice
from penstock.gateway.machine import Request

__all__ = ["AccessLine", "failed", "line", "note"]

_MOST_CHARACTERS = 300


class AccessLine:
    """What is known of a request so far. `status` is the door's own: a gRPC status by name, or an HTTP status."""

    def __init__(self, status: str | int) -> None:
        self.status = status
        self.facts: dict[str, object] = {}


_current: ContextVar[AccessLine | None] = ContextVar("access_line", default=None)


@contextmanager
def line(door: str, method: str, *, unanswered: str | int, quiet: bool) -> Iterator[AccessLine]:
    """Write the line when the block ends.

    Args:
        door: grpc or http.
        method: the RPC, or the HTTP method and path.
        unanswered: the status of a request whose client left before there was one.
        quiet: whether the line is for debugging alone: questions about the state come by the second.
    """
    begun = time.perf_counter()
    current = AccessLine(unanswered)
    token = _current.set(current)
    try:
        yield current
    finally:
        _current.reset(token)
        seconds = round(time.perf_counter() - begun, 6)
        write = logger().debug if quiet else logger().info
        write("request", door=door, method=method, status=current.status, seconds=seconds, **current.facts)


def failed(error: BaseException) -> None:
    """Add why the task's request failed. The text of a defect may be long, and stands in the log by itself."""
    current = _current.get()
    if current is not None:
        current.facts["error"] = type(error).__name__
        if isinstance(error, PenstockError) and not isinstance(error, InternalError):
            current.facts["why"] = str(error)[:_MOST_CHARACTERS]


def note(model: str, requests: Sequence[Request]) -> None:
    """Add how a call's requests have run to the line of the task."""
    current = _current.get()
    if current is None or not requests:
        return
    choices = [(request, choice) for request in requests for choice in request.choices]
    first = min((r.record.first_token_at - r.record.arrived for r in requests if r.record.first_token_at is not None), default=None)
    current.facts |= {
        "model": model,
        "prompt_tokens": sum(len(r.plan.prompt_ids) for r in requests),
        "cached_tokens": sum(r.record.cached_tokens for r in requests),
        "completion_tokens": sum(c.told_tokens for _, c in choices),
        "finish": [_finish(r, c) for r, c in choices],
        "queue_seconds": round(max(r.record.queue_seconds for r in requests), 6),
        "first_token_seconds": first if first is None else round(first, 6),
        "replacements": sum(r.record.replacements for r in requests),
        "fallbacks": [f"{fallback.value}: {reason.value}" for r in requests for fallback, reason, _ in r.record.fallbacks],
    }


def _finish(request: Request, choice: Choice) -> str:
    if choice.finish is not None:
        return choice.finish.reason.value
    return "cancelled" if request.error is None else type(request.error).__name__
