"""One gateway stream's sequences, for whoever watches: spans of their stages, and a log line for each that could not be run."""

from __future__ import annotations

import time
from collections.abc import Iterable

from penstock.common import tracing
from penstock.common.handoff import HandoffFailure
from penstock.common.logs import logger
from penstock.executor.handoff.ticket import Arrival
from penstock.executor.sequence import Finish, Finished, Frame, Started

__all__ = ["StreamTraces"]

_UNWELL = (Finish.FAILED, Finish.REFUSED, Finish.HANDOFF_FAILED)


class StreamTraces:
    """Knows the request that each live sequence of a stream belongs to. Nothing is done per token."""

    def __init__(self) -> None:
        self._requests: dict[int, tuple[str, str]] = {}

    def begin(self, sequence_id: int, request_id: str, traceparent: str) -> None:
        """A sequence was asked for."""
        self._requests[sequence_id] = (request_id, traceparent)

    def forget(self, sequence_ids: Iterable[int]) -> None:
        """Sequences were aborted."""
        for sequence_id in sequence_ids:
            request_id, _ = self._requests.pop(sequence_id, ("", ""))
            logger().debug("sequence aborted", request_id=request_id)

    def tell(self, frame: Frame) -> None:
        """Take note of what a step gave."""
        if frame.started and tracing.enabled():
            now = time.time_ns()
            for started in frame.started:
                self._tell_start(started, now)
        if frame.arrived and tracing.enabled():
            for sequence_id, arrival in frame.arrived:
                self._tell_arrival(sequence_id, arrival, time.time_ns())
        for finished in frame.finished:
            self._tell_finish(finished)

    def _tell_start(self, started: Started, now: int) -> None:
        _, parent = self._requests.get(started.sequence_id, ("", ""))
        first_step = now - int(started.prefill * 1e9)
        tracing.start("wait", parent, at_ns=first_step - int(started.waited * 1e9)).end(at_ns=first_step)
        tracing.start("prefill", parent, {"cached_tokens": started.cached_tokens}, at_ns=first_step).end(at_ns=now)

    def _tell_arrival(self, sequence_id: int, arrival: Arrival, now: int) -> None:
        _, parent = self._requests.get(sequence_id, ("", ""))
        facts = {
            "kv_bytes": arrival.kv_bytes,
            "transport": arrival.transport.value,
            "native": arrival.native,
            "pushes": arrival.pushes,
        }
        tracing.start("import", parent, facts, at_ns=now - int(arrival.transfer * 1e9)).end(at_ns=now)

    def _tell_finish(self, finished: Finished) -> None:
        request_id, parent = self._requests.pop(finished.sequence_id, ("", ""))
        # That the other half has ended the handoff is told by that one.
        if finished.reason in _UNWELL and finished.handoff_failure is not HandoffFailure.ABORTED:
            logger().warning("sequence not run", request_id=request_id, reason=finished.reason.value, message=finished.message)
            return
        logger().debug(
            "sequence finished",
            request_id=request_id,
            reason=finished.reason.value,
            preemptions=finished.preemptions,
            decode_seconds=round(finished.decode, 6),
        )
        if finished.decode and tracing.enabled():
            now = time.time_ns()
            facts = {"finish": finished.reason.value, "preemptions": finished.preemptions}
            tracing.start("decode", parent, facts, at_ns=now - int(finished.decode * 1e9)).end(at_ns=now)
