"""Spans of a call: the request, and its queue, prefill and decode as they are known afterwards."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from penstock.common import tracing
from penstock.gateway.machine import Request
from penstock.gateway.request import Caller

__all__ = ["Trace"]


class Trace:
    """The span of one call, current while it is admitted. `caller` bears its identity on to the executors."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self._context = tracing.span("request", caller.traceparent, {"request_id": caller.request_id, "tenant": caller.tenant})

    def __enter__(self) -> Self:
        self._span = self._context.__enter__()
        if self._span.traceparent:
            self.caller = dataclasses.replace(self.caller, traceparent=self._span.traceparent)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None) -> None:
        self._context.__exit__(kind, error, where)

    def done(self, requests: Sequence[Request]) -> None:
        """Tell where the time of each request went."""
        if not tracing.enabled():
            return
        for request in requests:
            now, unix_ns = request.now(), time.time_ns()
            for name, begin, end, facts in _parts(request, now):
                span = tracing.start(name, self.caller.traceparent, facts, at_ns=unix_ns - int((now - begin) * 1e9))
                span.end(at_ns=unix_ns - int((now - end) * 1e9))
            self._span.set(
                {
                    "model": request.plan.model,
                    "prompt_tokens": len(request.plan.prompt_ids),
                    "completion_tokens": sum(c.told_tokens for c in request.choices),
                    "replacements": request.record.replacements,
                    "prefill_executor_id": request.record.prefill_executor_id,
                    "decode_executor_id": request.record.decode_executor_id,
                }
            )


def _parts(request: Request, now: float) -> Iterator[tuple[str, float, float, tracing.Attributes]]:
    """Spans by name, begin, end and facts. A fallback is a moment, and where a request was placed or computed again."""
    placed, first, last = request.record.placed_at or now, request.record.first_token_at or now, request.record.last_token_at or now
    for name, begin, end in (("place", request.record.begun, placed), ("prefill", placed, first), ("decode", first, last)):
        if end > begin:
            yield name, begin, end, {}
    for begin, end in request.record.reserved:
        yield "reserve", begin, end, {}
    for at, arrival in request.record.arrivals:
        yield "transfer", at - arrival.transfer_seconds, at, {"kv_bytes": arrival.kv_bytes, "transport": arrival.transport}
    for fallback, reason, at in request.record.fallbacks:
        yield "fallback", at, at, {"fallback": fallback.value, "reason": reason.value}
