"""The engine's side of `handoff/ports.py`: sequences whose KV comes from another executor, or goes to one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from penstock.backends.contract import ModelLost
from penstock.backends.reports import text_of
from penstock.common.handoff import HandoffFailure
from penstock.executor.commands import Commands
from penstock.executor.frames import Frames
from penstock.executor.handoff.ports import Exported, Handle, HandoffEvents, Imported, SequenceEnded, always
from penstock.executor.handoff.ticket import Arrival
from penstock.executor.kv_moves import KvMoves
from penstock.executor.live_sequences import LiveSequences
from penstock.executor.model_runner import EngineDead, ModelRunner
from penstock.executor.sequence import Finish, Sequence, Status
from penstock.executor.step_planner import Step, StepPlanner

__all__ = ["EngineHandoff"]

# Copies of KV between two steps: while others compute, a share of what the last step took and at least so long; else longer.
_MOVE_SHARE, _LEAST_MOVE_SECONDS, _MOVE_SECONDS = 0.1, 0.005, 0.1
# Within that, how long the next copy is waited for before the next step begins.
_PATIENCE = 0.02


class EngineHandoff:
    """A `KvEngine`: what its methods ask for is done in the engine's thread, between two steps.

    Args:
        vocabulary_size: of the model.

    Attributes:
        events: hears of sequences that are handed over; without it none is taken. Set only before the engine starts.
    """

    def __init__(
        self,
        runner: ModelRunner,
        planner: StepPlanner,
        sequences: LiveSequences,
        commands: Commands,
        frames: Frames,
        *,
        vocabulary_size: int,
    ) -> None:
        self.events: HandoffEvents | None = None
        self._runner = runner
        self._planner = planner
        self._sequences = sequences
        sequences.on_end = self.ended
        self._commands = commands
        self._frames = frames
        self._vocabulary_size = vocabulary_size
        self._block_size = runner.model.kv.block_size
        self._moves = KvMoves(runner.model)

    # `KvEngine`, from any thread

    def export_kv(
        self, handle: Handle, tokens: range, *, native: bool, done: Exported, wanted: Callable[[], bool] = always
    ) -> None:
        """Copy KV out of a sequence's blocks, as `KvEngine` says. What can not be done is an exception that `done` gets."""
        sequence = _sequence(handle)
        if not self._commands.give(lambda: self._moves.ask_export(sequence, tokens, done, wanted, native=native)):
            done(SequenceEnded("the engine has ended"))

    def import_kv(self, handle: Handle, tokens: range, data: NDArray[Any], *, native: bool, done: Imported) -> None:
        """Copy KV into the blocks that were reserved for a sequence; the same."""
        sequence = _sequence(handle)

        def ask() -> None:
            sequence.arriving = True
            self._moves.ask_import(sequence, tokens, data, done, native=native)

        if not self._commands.give(ask):
            done(SequenceEnded("the engine has ended"))

    def begin_decode(self, handle: Handle, first_token: int, arrival: Arrival) -> None:
        """Decode a sequence whose KV is here. Nothing is told to `events` of it any more, unless it has ended before."""
        sequence = _sequence(handle)
        self._commands.give(lambda: self._go_on(sequence, first_token, arrival))

    def handed_off(self, handle: Handle) -> None:
        """End a sequence that is decoded elsewhere from now on."""
        sequence = _sequence(handle)
        self._commands.give(lambda: self._finish(sequence, Finish.HANDED_OFF))

    def leave(self, handle: Handle) -> None:
        """End a sequence that has ended where it was prefilled."""
        sequence = _sequence(handle)
        self._commands.give(lambda: self._leave(sequence))

    def fail(self, handle: Handle, failure: HandoffFailure, message: str) -> None:
        """End a sequence whose KV could not be handed over."""
        sequence = _sequence(handle)
        self._commands.give(lambda: self._finish(sequence, Finish.HANDOFF_FAILED, message, failure))

    # What the engine tells

    def begun(self, sequence: Sequence) -> None:
        """A sequence has come, told by whichever thread submits it."""
        if sequence.sends and self.events is not None:
            sequence.handing = True
            self.events.begun(sequence)

    def reserved(self, sequences: list[Sequence]) -> None:
        """Blocks wait for KV. Told at once: elsewhere prefill begins with it."""
        if not sequences:
            return
        for sequence in sequences:
            if self.events is not None:
                sequence.handing = True
                ticket = self.events.reserved(sequence, sequence.computed, len(sequence.ids))
                self._frames.of(sequence).reserved.append((sequence.request.sequence_id, ticket))
        self._frames.publish()

    def computed(self, step: Step) -> None:
        """KV of a step stands in its sequences' blocks."""
        if self.events is not None:
            for sequence in step.sequences:
                if sequence.sends:
                    self.events.computed(sequence, sequence.computed)

    def drawn(self, sequence: Sequence, token: int) -> None:
        """A sequence that sends has its first token, which is not its last: it waits for its blocks to be read."""
        if self.events is not None:
            self._planner.set_aside(sequence)
            self.events.drawn(sequence, token)

    def ended(self, sequence: Sequence) -> None:
        """A sequence has ended, by whatever."""
        if sequence.handing and self.events is not None:
            sequence.handing = False
            self.events.ended(sequence)

    # Copies, in the engine's thread

    @property
    def moving(self) -> bool:
        """Whether copies wait to be made. May be called from other threads."""
        return bool(self._moves)

    def move_kv(self) -> None:
        """Copy KV in and out.

        A sequence that is computed and has only to leave is answered at once: what is asked for when its last copy has gone would
        else wait for a whole step of others.
        """
        began, share = time.monotonic(), _MOVE_SHARE * self._runner.step_seconds
        computing = self._planner.running or self._planner.waiting
        self._make_moves(began + (max(_LEAST_MOVE_SECONDS, share) if computing else _MOVE_SECONDS))
        while computing and self._planner.sending and self._is_asked(began + share):
            self._commands.obey()
            self._make_moves(began + share)

    def give_up_moves(self) -> None:
        """Every sequence has ended."""
        self._moves.give_up()

    def _make_moves(self, until: float) -> None:
        try:
            self._moves.make(until, self._runner.watch)
        except ModelLost as error:
            raise EngineDead(text_of(error)) from error

    def _is_asked(self, until: float) -> bool:
        """Wait a little for another command."""
        left = until - time.monotonic()
        with self._commands.changed:
            return left > 0 and self._commands.changed.wait_for(lambda: bool(self._commands), min(left, _PATIENCE))

    # What `KvEngine` asks for, in the engine's thread

    def _go_on(self, sequence: Sequence, first_token: int, arrival: Arrival) -> None:
        """Let a sequence decode behind KV that has come and a token that was told elsewhere."""
        if not (sequence.handing and sequence.status is Status.RECEIVING):
            return
        if not 0 <= first_token < self._vocabulary_size:
            message = f"the first token is {first_token}, of a vocabulary of {self._vocabulary_size}"
            self._finish(sequence, Finish.HANDOFF_FAILED, message, HandoffFailure.REFUSED)
            return
        sequence.handing = False
        self._planner.go_on(sequence)
        sequence.first_token_at = time.monotonic()
        self._frames.of(sequence).arrived.append((sequence.request.sequence_id, arrival))
        finish = sequence.append(first_token, self._block_size)
        if finish is not None:
            self._sequences.finish(sequence, finish)

    def _finish(self, sequence: Sequence, reason: Finish, message: str = "", failure: HandoffFailure | None = None) -> None:
        if sequence.handing:
            sequence.handing = False
            self._sequences.finish(sequence, reason, message, failure)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.handing:
            sequence.handing = False
            self._sequences.remove(sequence)


def _sequence(handle: Handle) -> Sequence:
    """The engine's own sequence, of which the handoff knows the handle alone."""
    if not isinstance(handle, Sequence):
        raise TypeError(f"{handle!r} is no sequence of an engine")
    return handle
