"""What of a sequence's KV goes next, and what is on its way, on the side that prefills."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from penstock.executor.handoff.sender_states import NO_STREAM, Cut, OutgoingChunk
from penstock.executor.handoff.transports.port import Parcel

__all__ = ["ChunkQueue"]


class ChunkQueue:
    """KV of one sequence, cut into chunks: copied out in any order, pushed in the order of their tokens.

    Args:
        tokens: that are to go.

    Attributes:
        cut: how the stream wants it cut.
        pushed: tokens before this one have been pushed, in whichever epoch.
    """

    def __init__(self, tokens: int) -> None:
        self.cut: Cut = NO_STREAM
        self.pushed = 0
        self._tokens = tokens
        self._computed = 0
        self._next = 0  # tokens before this one are there, or on their way
        self._leaving: deque[OutgoingChunk] = deque()
        self._unanswered: set[int] = set()  # first tokens of pushes of this epoch

    def __contains__(self, chunk: OutgoingChunk) -> bool:
        return chunk in self._leaving

    @property
    def all_cut(self) -> bool:
        """Whether the last chunk has been cut, if not pushed."""
        return self._next >= self._tokens

    @property
    def all_pushed(self) -> bool:
        return self.all_cut and not self._leaving

    @property
    def unanswered(self) -> bool:
        """Whether a push awaits its answer."""
        return bool(self._unanswered)

    def computed(self, tokens: int) -> None:
        """KV of so many is there."""
        self._computed = max(self._computed, tokens)

    def next_tokens(self) -> range:
        """What the next chunk would hold: whole blocks, but at the end."""
        block = self.cut.block_size
        end = min(self._computed, self._tokens, self._next // block * block + self.cut.most_tokens)
        if end < self._tokens:
            end = end // block * block
        return range(self._next, max(end, self._next))

    def cut_next(self) -> OutgoingChunk | None:
        """The next chunk, to be copied out; None where too little is computed for one."""
        tokens = self.next_tokens()
        if not tokens:
            return None
        chunk = OutgoingChunk(tokens, native=self.cut.native and tokens.start % self.cut.block_size == 0)
        self._leaving.append(chunk)
        self._next = tokens.stop
        return chunk

    def push_ready(self) -> Iterator[tuple[OutgoingChunk, Parcel]]:
        """The chunks whose turn it is and that were copied out, each taken out to be pushed."""
        while self._leaving and (parcel := self._leaving[0].parcel) is not None:
            chunk = self._leaving.popleft()
            self._unanswered.add(chunk.tokens.start)
            self.pushed = max(self.pushed, chunk.tokens.stop)
            yield chunk, parcel

    def answered(self, first_token: int) -> None:
        """The push that began with this token has been imported."""
        self._unanswered.discard(first_token)

    def remove(self, chunk: OutgoingChunk) -> None:
        """One that is not to be pushed."""
        self._leaving.remove(chunk)

    def take_all(self) -> Iterator[OutgoingChunk]:
        """Chunks that were not pushed, each taken out; no answer is awaited behind them."""
        while self._leaving:
            yield self._leaving.popleft()
        self._unanswered.clear()

    def go_on_from(self, token: int) -> None:
        """Tokens before this one are there; of the others all are wanted."""
        self._next = token
