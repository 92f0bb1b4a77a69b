"""What requests hold against executors, registered or not: a lease each, and another while prefill runs elsewhere."""

from __future__ import annotations

from penstock.scheduler.model import Prefill
from penstock.scheduler.placement import Placement
from penstock.scheduler.registry import Registry
from penstock.scheduler.requests import Request

__all__ = ["Leases"]


class Leases:
    """Takes leases, and gives them back.

    Args:
        executors: where they are held.
    """

    def __init__(self, executors: Registry) -> None:
        self._executors = executors

    def take(self, request: Request, executor_id: str, tokens: int) -> None:
        """Hold a request's sequences and so many tokens against an executor."""
        request.hold = self._executors.hold(executor_id)
        request.leased_tokens = tokens
        request.hold.add(request.needs.choices, tokens)

    def take_prefill(self, request: Request, executor_id: str, tokens: int) -> None:
        """Hold the prefill of one sequence of a request that has its lease against another executor."""
        request.prefill_hold = self._executors.hold(executor_id)
        request.prefill_tokens = tokens
        request.prefill_hold.add_prefill(tokens)
        if request.hold is not None:
            request.hold.receive(request.leased_tokens)

    def grant(self, request: Request, placement: Placement) -> Prefill | None:
        """Take the leases of a placement; what is told of the prefill's."""
        prompt, executor, prefill = request.needs.prompt_tokens, placement.executor, placement.prefill
        self.take(request, executor.description.executor_id, max(request.tokens - placement.cached_tokens, 1))
        if prefill is None:
            executor.fresh_tokens += prompt - placement.cached_tokens
            return None
        tokens = prompt - placement.prefill_cached_tokens
        self.take_prefill(request, prefill.description.executor_id, tokens)
        prefill.fresh_tokens += tokens
        return Prefill(prefill.description.executor_id, prefill.description.address, tokens, placement.prefill_cached_tokens)

    def announce(self, request: Request, executor_id: str, tokens: int, prefill: tuple[str, int] | None) -> None:
        """Take over leases that were granted before; what executors reported of them is known now."""
        self.take(request, executor_id, tokens)
        self._announced(executor_id, request.needs.choices)
        if prefill is not None:
            self.take_prefill(request, *prefill)
            self._announced(prefill[0], 1)

    def free(self, request: Request) -> None:
        """Give all back that a request holds."""
        self.free_prefill(request)
        hold, request.hold = request.hold, None
        if hold is not None:
            hold.subtract(request.needs.choices, request.leased_tokens)
            self._executors.freed(hold)

    def free_prefill(self, request: Request) -> None:
        """Give the prefill's lease back, if there is one."""
        hold, request.prefill_hold = request.prefill_hold, None
        if hold is None:
            return
        hold.subtract_prefill(request.prefill_tokens)
        self._executors.freed(hold)
        if request.hold is not None:
            request.hold.received(request.leased_tokens)
            self._executors.freed(request.hold)

    def _announced(self, executor_id: str, sequences: int) -> None:
        executor = self._executors.get(executor_id)
        if executor is not None:
            executor.announced(sequences)
