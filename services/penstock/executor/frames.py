"""What a step gives, gathered for those whom it concerns."""

from __future__ import annotations

import time

from penstock.common.handoff import HandoffFailure
from penstock.executor.sampling import Sampled
from penstock.executor.sequence import Finish, Finished, Frame, Sequence, Sink, Started

__all__ = ["Frames"]


class Frames:
    """A frame for each sink that is to hear something. All of it in the engine's thread."""

    def __init__(self) -> None:
        self._frames: dict[Sink, Frame] = {}

    def __bool__(self) -> bool:
        """Whether anybody is to hear anything."""
        return bool(self._frames)

    def of(self, sequence: Sequence) -> Frame:
        """The frame in which something is told of a sequence."""
        frame = self._frames.get(sequence.sink)
        if frame is None:
            frame = self._frames[sequence.sink] = Frame()
        return frame

    def token(self, sequence: Sequence, drawn: Sampled) -> None:
        """A token was drawn; the sequence does not hold it yet."""
        frame, sequence_id, position = self.of(sequence), sequence.request.sequence_id, sequence.output_length
        frame.sequence_ids.append(sequence_id)
        frame.token_ids.append(drawn.token)
        frame.positions.append(position)
        if drawn.logprob is not None:
            frame.logprobs.append((sequence_id, position, drawn.logprob))

    def started(self, sequence: Sequence) -> None:
        """It is the first that is drawn here."""
        frame, sequence_id = self.of(sequence), sequence.request.sequence_id
        waited = sequence.first_step_at - sequence.submitted_at
        prefill = sequence.first_token_at - sequence.first_step_at
        frame.started.append(Started(sequence_id, sequence.cached_tokens, waited, prefill))
        if sequence.prompt_logprobs is not None:
            frame.prompt_logprobs.append((sequence_id, sequence.prompt_logprobs))

    def finished(self, sequence: Sequence, reason: Finish, message: str, failure: HandoffFailure | None) -> None:
        """It has ended. One that is decoded elsewhere has not decoded here."""
        decodes = sequence.first_token_at and not sequence.sends
        decode = time.monotonic() - sequence.first_token_at if decodes else 0.0
        finished = Finished(sequence.request.sequence_id, reason, sequence.preemptions, message, decode, failure)
        self.of(sequence).finished.append(finished)

    def publish(self) -> None:
        """Hand every frame to its sink."""
        if self._frames:
            for sink, frame in self._frames.items():
                sink(frame)
            self._frames = {}
