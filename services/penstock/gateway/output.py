"""The queue between requests and the client that reads them: what a slow client has not read yet is joined, never repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from penstock.common.errors import PenstockError
from penstock.gateway.answer import Closing, Delta, Finish, Logprob

__all__ = ["OutputQueue", "RequestOutput"]


class OutputQueue:
    """Holds at most one delta per choice, so it never outgrows the tokens that the requests may make.

    One or more requests write to it, each through an output of its own; one reader takes. A request that fails ends the queue.
    """

    def __init__(self, requests: int, clock: Callable[[], float]) -> None:
        self.closings: list[Closing | None] = [None] * requests
        self.waiting_since: float | None = None
        self._writing_since: float | None = None
        self._open = requests
        self._pending: dict[int, Delta] = {}
        self._error: PenstockError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._clock = clock

    @property
    def pending(self) -> bool:
        """Whether something waits for the reader."""
        return bool(self._pending) or self._error is not None or self._open == 0

    @property
    def stuck_since(self) -> float | None:
        """Since when the reader takes nothing: neither what waits here, nor what its door writes."""
        return self.waiting_since if self._writing_since is None else self._writing_since

    def write_begins(self) -> None:
        """The door writes to its client."""
        self._writing_since = self._clock()

    def write_ended(self) -> None:
        """The client took it."""
        self._writing_since = None

    def output(self, number: int, choices: int) -> RequestOutput:
        """Where the request of this number writes; its choices are counted on from those of the requests before it."""
        return RequestOutput(self, number, number * choices)

    async def wait(self, seconds: float | None = None) -> bool:
        """Wait until something is pending, for so long at most; whether it is."""
        if self.pending:
            return True
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            if seconds is None:
                await self._waiter
            else:
                await asyncio.wait((self._waiter,), timeout=seconds)
        finally:
            self._waiter = None
        return self.pending

    async def take(self) -> Sequence[Delta]:
        """All that is pending, one delta a choice. Empty: every request has closed.

        Raises:
            PenstockError: a request failed. What was pending before is given first.
        """
        if not self._pending and self._error is None and self._open:
            await self.wait()
        return self.take_now()

    def take_now(self) -> Sequence[Delta]:
        """The same without waiting; what is pending may be nothing."""
        self.waiting_since = None
        if self._pending:
            taken, self._pending = self._pending, {}
            return list(taken.values())
        if self._error is not None:
            raise self._error
        return ()

    def delta(self, index: int) -> Delta:
        """The pending delta of a choice, to be added to."""
        found = self._pending.get(index)
        if found is None:
            found = self._pending[index] = Delta(index)
            self._wake()
        return found

    def close(self, number: int, closing: Closing) -> None:
        """One request is complete."""
        self.closings[number] = closing
        self._open -= 1
        if self._open == 0:
            self._wake()

    def fail(self, error: PenstockError) -> None:
        """One request failed; the first failure counts."""
        if self._error is None:
            self._error = error
            self._wake()

    def _wake(self) -> None:
        if self.waiting_since is None:
            self.waiting_since = self._clock()
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class RequestOutput:
    """`penstock.gateway.ports.OutputPort` of one request."""

    def __init__(self, queue: OutputQueue, number: int, base: int) -> None:
        self._queue = queue
        self._number = number
        self._base = base

    def text(self, index: int, text: str, token_ids: Sequence[int], logprobs: Sequence[Logprob]) -> None:
        """More of a choice."""
        delta = self._queue.delta(self._base + index)
        if text:
            delta.parts.append(text)
        if token_ids:
            delta.token_ids.extend(token_ids)
        if logprobs:
            delta.logprobs.extend(logprobs)

    def prompt(self, index: int, logprobs: Sequence[Logprob]) -> None:
        """Log-probabilities of the prompt."""
        self._queue.delta(self._base + index).prompt_logprobs.extend(logprobs)

    def finish(self, index: int, finish: Finish) -> None:
        """A choice is complete."""
        self._queue.delta(self._base + index).finish = finish

    def close(self, closing: Closing) -> None:
        """The request is complete."""
        self._queue.close(self._number, closing)

    def fail(self, error: PenstockError) -> None:
        """The request failed."""
        self._queue.fail(error)
