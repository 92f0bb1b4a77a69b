"""Queues of requests that the same executors can run: fairness between tenants first, then a tenant's priorities, then arrival.

What was running before goes before all of it, with accounts of its own. Priorities are a client's word: they order its tenant's
requests, and take no other tenant's turn.

Fairness is start-time fair queueing (Goyal, Vin and Cheng, 1996): a tenant's virtual time grows by the tokens of each request that
is placed, and the tenant with the least goes next. Two tenants that both have requests waiting never differ by more than the
largest request of each. A tenant that comes back starts at the time of the request placed last, so it saves nothing up.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from penstock.scheduler.model import Role
from penstock.scheduler.requests import Request

__all__ = ["FairQueue", "Lane", "Shares"]


class _Share:
    __slots__ = ("queued", "virtual")

    def __init__(self, virtual: int) -> None:
        self.virtual = virtual
        self.queued = 0


class Shares:
    """Virtual times of the tenants at one rank of one model, whatever lanes their requests wait in."""

    def __init__(self) -> None:
        self.clock = 0
        self.queued = 0
        self._tenants: dict[str, _Share] = {}
        self._sweep_at = 1024

    def virtual(self, tenant: str) -> int:
        """A waiting tenant's virtual time."""
        return self._tenants[tenant].virtual

    def enter(self, tenant: str) -> int:
        """One more request of the tenant waits; its virtual time."""
        share = self._tenants.get(tenant)
        if share is None:
            if len(self._tenants) >= self._sweep_at:
                self._sweep()
            share = self._tenants[tenant] = _Share(self.clock)
        elif not share.queued:
            share.virtual = max(share.virtual, self.clock)
        share.queued += 1
        self.queued += 1
        return share.virtual

    def leave(self, tenant: str, served_tokens: int = 0) -> int:
        """One request of the tenant waits no more, served or not; the tenant's virtual time."""
        share = self._tenants[tenant]
        share.queued -= 1
        self.queued -= 1
        if served_tokens:
            self.clock = max(self.clock, share.virtual)
            share.virtual += served_tokens
        if not share.queued and share.virtual <= self.clock:
            del self._tenants[tenant]
        return share.virtual

    def _sweep(self) -> None:
        self._tenants = {name: s for name, s in self._tenants.items() if s.queued or s.virtual > self.clock}
        self._sweep_at = max(1024, 2 * len(self._tenants))


class _Line:
    """One tenant's requests in one queue: those of higher priority first, then in order of arrival."""

    __slots__ = ("_of_priority", "_order")

    def __init__(self) -> None:
        self._of_priority: dict[int, OrderedDict[int, Request]] = {}
        self._order: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._order)

    def __iter__(self) -> Iterator[Request]:
        for requests in self._of_priority.values():
            yield from requests.values()

    def push(self, request: Request) -> None:
        key = -request.needs.priority
        requests = self._of_priority.get(key)
        if requests is None:
            requests = self._of_priority[key] = OrderedDict()
            heapq.heappush(self._order, key)
        requests[request.order] = request

    def remove(self, request: Request) -> None:
        key = -request.needs.priority
        requests = self._of_priority[key]
        del requests[request.order]
        if not requests:
            del self._of_priority[key]
            self._order.remove(key)
            heapq.heapify(self._order)

    def first(self) -> Request:
        return next(iter(self._of_priority[self._order[0]].values()))


class FairQueue:
    """Requests of one lane at one rank.

    The heap's keys may be behind their tenants' virtual times, which only grow: what comes up is checked, and put back if it is.
    """

    def __init__(self, shares: Shares) -> None:
        self._shares = shares
        self._waiting: dict[str, _Line] = {}
        self._heap: list[tuple[int, int, str]] = []
        self._empty = 0
        self.count = 0

    def __iter__(self) -> Iterator[Request]:
        for line in self._waiting.values():
            yield from line

    def push(self, request: Request) -> None:
        """Let a request wait in its tenant's line."""
        tenant = request.needs.tenant
        virtual = self._shares.enter(tenant)
        line = self._waiting.get(tenant)
        if line is None:
            line = self._waiting[tenant] = _Line()
            heapq.heappush(self._heap, (virtual, request.order, tenant))
        elif not line:
            self._empty -= 1
        line.push(request)
        self.count += 1

    def remove(self, request: Request) -> None:
        """Take out a request that is not served."""
        line = self._waiting[request.needs.tenant]
        line.remove(request)
        self.count -= 1
        self._shares.leave(request.needs.tenant)
        if not line:
            self._empty += 1
            if self._empty > 64 and 2 * self._empty > len(self._heap):
                self._sweep()

    def head(self) -> tuple[int, Request]:
        """The virtual time and the request of the tenant whose turn it is; `count` is not 0."""
        heap, waiting = self._heap, self._waiting
        while True:
            virtual, order, tenant = heap[0]
            line = waiting[tenant]
            if not line:
                heapq.heappop(heap)
                del waiting[tenant]
                self._empty -= 1
                continue
            now = self._shares.virtual(tenant)
            if now == virtual:
                return virtual, line.first()
            heapq.heapreplace(heap, (now, order, tenant))

    def serve(self, request: Request) -> None:
        """Take out the request that `head` told, and charge its tenant."""
        tenant = request.needs.tenant
        line = self._waiting[tenant]
        line.remove(request)
        self.count -= 1
        virtual = self._shares.leave(tenant, request.tokens)
        if line:
            heapq.heapreplace(self._heap, (virtual, request.order, tenant))
        else:
            heapq.heappop(self._heap)
            del self._waiting[tenant]

    def _sweep(self) -> None:
        self._waiting = {tenant: line for tenant, line in self._waiting.items() if line}
        self._heap = [entry for entry in self._heap if entry[2] in self._waiting]
        heapq.heapify(self._heap)
        self._empty = 0


class Lane:
    """Requests that exactly the same executors, named by a mask of their bits, can run.

    Attributes:
        count: how many.
        waits_for: executors of this role have no room for the first of them, or had none when that was last looked for.
    """

    def __init__(self, mask: int, shares: dict[int, Shares], waits_for: Role) -> None:
        self.mask = mask
        self.count = 0
        self.waits_for = waits_for
        self._shares = shares
        self._queues: dict[int, FairQueue] = {}
        self._ranks: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __iter__(self) -> Iterator[Request]:
        for queue in self._queues.values():
            yield from queue

    def push(self, request: Request) -> None:
        """Let a request wait."""
        queue = self._queues.get(request.rank)
        if queue is None:
            shares = self._shares.get(request.rank)
            if shares is None:
                shares = self._shares[request.rank] = Shares()
            queue = self._queues[request.rank] = FairQueue(shares)
            heapq.heappush(self._ranks, request.rank)
        queue.push(request)
        self.count += 1
        request.lane = self

    def remove(self, request: Request) -> None:
        """Take out a request that is not served."""
        queue = self._queues[request.rank]
        queue.remove(request)
        self._left(request, queue)

    def head(self) -> tuple[int, int, Request]:
        """Rank, virtual time and the request that is next; the lane is not empty."""
        rank = self._ranks[0]
        virtual, request = self._queues[rank].head()
        return rank, virtual, request

    def serve(self, request: Request) -> None:
        """Take out the request that `head` told, and charge its tenant."""
        queue = self._queues[request.rank]
        queue.serve(request)
        self._left(request, queue)

    def _left(self, request: Request, queue: FairQueue) -> None:
        request.lane = None
        self.count -= 1
        rank = request.rank
        if not queue.count:
            del self._queues[rank]
            self._ranks.remove(rank)
            heapq.heapify(self._ranks)
        shares = self._shares[rank]
        if not shares.queued:
            del self._shares[rank]
