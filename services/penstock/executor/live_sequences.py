"""The sequences that an engine has taken, from their coming to their end."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from penstock.common.handoff import HandoffFailure
from penstock.executor.frames import Frames
from penstock.executor.meter import Meter
from penstock.executor.sequence import Finish, Sequence, Sink
from penstock.executor.step_planner import StepPlanner

__all__ = ["LiveSequences"]


class LiveSequences:
    """By sink and id. A sequence ends here alone, whatever ends it.

    All of it in the engine's thread or, once that has ended, in its closer's.

    Attributes:
        on_end: told of each that has ended, and of one that was refused when it came.
    """

    def __init__(self, planner: StepPlanner, frames: Frames, meter: Meter) -> None:
        self._planner = planner
        self._frames = frames
        self._meter = meter
        self.on_end: Callable[[Sequence], None] = _nobody
        self._by_sink: dict[Sink, dict[int, Sequence]] = {}

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn, unless its sink has another one of its id."""
        mine = self._by_sink.setdefault(sequence.sink, {})
        if sequence.request.sequence_id in mine:
            self._frames.finished(sequence, Finish.REFUSED, "its sequence_id is in use", None)
            self.on_end(sequence)
            return
        mine[sequence.request.sequence_id] = sequence
        self._planner.add(sequence)

    def finish(self, sequence: Sequence, reason: Finish, message: str = "", failure: HandoffFailure | None = None) -> None:
        """End a sequence and tell its sink."""
        self._frames.finished(sequence, reason, message, failure)
        self._meter.finished[reason] += 1
        self.remove(sequence)

    def remove(self, sequence: Sequence) -> None:
        """End a sequence of which nothing more is told."""
        self._planner.remove(sequence)
        mine = self._by_sink[sequence.sink]
        del mine[sequence.request.sequence_id]
        if not mine:
            del self._by_sink[sequence.sink]
        self.on_end(sequence)

    def abort(self, sink: Sink, sequence_ids: Iterable[int] | None = None) -> None:
        """End those of a sink that have these ids, or all of it; nothing more is told of them."""
        mine = self._by_sink.get(sink, {})
        for sequence_id in list(mine) if sequence_ids is None else sequence_ids:
            if sequence_id in mine:
                self.remove(mine[sequence_id])

    def fail_all(self, message: str) -> None:
        """End all, and tell everyone why."""
        for sequence in self._all():
            self.finish(sequence, Finish.FAILED, message)

    def remove_all(self) -> None:
        """End all; nothing more is told of them."""
        for sequence in self._all():
            self.remove(sequence)

    def _all(self) -> list[Sequence]:
        return [sequence for mine in self._by_sink.values() for sequence in mine.values()]


def _nobody(_: Sequence) -> None:
    """Where nobody is told."""
