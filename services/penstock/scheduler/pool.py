"""One model: its executors, and the requests that wait for them."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

from penstock.scheduler.admission import DrainRate, admits
from penstock.scheduler.executors import Executor
from penstock.scheduler.lanes import Lane, Shares
from penstock.scheduler.model import Needs, Role
from penstock.scheduler.placement import Placement, Rules, place
from penstock.scheduler.prefixes import PrefixIndex
from penstock.scheduler.requests import Request
from penstock.scheduler.routing import Capable, Unsupported, capable, fitting
from penstock.scheduler.teams import Team, team_of

__all__ = ["Pool"]

_MATCHES = 4096

# Rank, virtual time of its tenant, and request that is next in a lane.
_Head = tuple[tuple[int, int, Request], Lane]


class Pool:
    """Routes requests into lanes and picks the next one that has room somewhere.

    Attributes:
        known: whether an executor of the model has been seen.
        last_seen: when its last executor left.
        live: its executors, by id; those that drain too.
        stranded: requests that no executor can run now, in order of arrival, for as long as one may come.
    """

    def __init__(self, model: str, index: PrefixIndex, rules: Rules, now: float) -> None:
        self.model = model
        self.known = False
        self.last_seen = now
        self.live: dict[str, Executor] = {}
        self.stranded: OrderedDict[int, Request] = OrderedDict()
        self.queued_tokens = 0
        self.drain_rate = DrainRate(now)
        self._index = index
        self._rules = rules
        self._open: tuple[Executor, ...] = ()
        self._lanes: dict[int, Lane] = {}
        self._teams: dict[int, Team] = {}
        self._shares: dict[int, Shares] = {}
        self._tenants: Counter[str] = Counter()
        self._queued = 0
        self._matches: dict[tuple[str, tuple[str, ...]], Capable | Unsupported] = {}

    @property
    def queued(self) -> int:
        """Requests that wait, stranded ones included."""
        return self._queued

    @property
    def placeable(self) -> bool:
        """Whether any executor takes requests."""
        return bool(self._open)

    def waiting(self) -> Iterator[Request]:
        """All requests that wait."""
        yield from self.stranded.values()
        for lane in self._lanes.values():
            yield from lane

    def waiting_by_role(self) -> Counter[Role]:
        """How many wait for each role, by what the first of each lane waits for. May be called from other threads."""
        waiting: Counter[Role] = Counter()
        for lane in list(self._lanes.values()):
            waiting[lane.waits_for] += lane.count
        return waiting

    def admits(self, tenant: str, tokens: int, max_requests: int, max_tokens: int) -> bool:
        """Whether a tenant may let one more request wait."""
        if self._queued and self.queued_tokens + tokens > max_tokens:
            return False
        return admits(self._queued, max_requests, self._tenants.get(tenant, 0), len(self._tenants))

    def route(self, needs: Needs) -> tuple[Executor, ...] | Unsupported:
        """The executors that can run a request: none now, or none as they are."""
        key = (needs.tokenizer_fingerprint, needs.fields)
        found = self._matches.get(key)
        if found is None:
            if len(self._matches) >= _MATCHES:
                self._matches.clear()
            found = self._matches[key] = capable(self.model, *key, self._open)
        if isinstance(found, Unsupported):
            return found
        if not needs.avoid and needs.prompt_tokens + needs.max_tokens <= found.least:
            return found.executors
        return fitting(needs, found)

    def enqueue(self, request: Request, executors: Sequence[Executor]) -> None:
        """Let a request wait for the executors that `route` told; for none: until one comes."""
        self._queued += 1
        self.queued_tokens += request.tokens
        self._tenants[request.needs.tenant] += 1
        self._wait(request, executors)

    def remove(self, request: Request) -> None:
        """Take out a request that waits."""
        if request.lane is None:
            del self.stranded[request.order]
        else:
            request.lane.remove(request)
        self._left(request)

    def next_placement(self, now: float) -> tuple[Request, Placement] | None:
        """Take out the request whose turn it is, with its place; None if no lane's first request has room anywhere.

        A lane whose first request has none knows the pool that it waits for.
        """
        heads = [(lane.head(), lane) for lane in self._lanes.values() if lane]
        if len(heads) > 1:
            heads = _in_turn(heads)
        for (_, _, request), lane in heads:
            placement = place(request, self._teams[lane.mask], self._index, lane.mask, self._rules, now)
            if isinstance(placement, Role):
                lane.waits_for = placement
                continue
            lane.serve(request)
            self._left(request)
            return request, placement
        return None

    def rebuild(self, *, strict: bool) -> list[tuple[Request, Unsupported]]:
        """Route all that waits anew, after executors came or left.

        Args:
            strict: whether what these executors do not support is given up, rather than left to wait for others.

        Returns:
            the requests that the executors which are left do not support, taken out.
        """
        self._open = tuple(e for e in self.live.values() if not e.draining)
        self._matches.clear()
        waiting = sorted(self.waiting(), key=lambda r: r.order)
        for request in waiting:
            if request.lane is not None:
                request.lane.remove(request)
        self.stranded.clear()
        self._lanes.clear()
        self._teams.clear()
        refused = []
        for request in waiting:
            executors = self.route(request.needs)
            if not isinstance(executors, Unsupported):
                self._wait(request, executors)
            elif strict:
                self._left(request)
                refused.append((request, executors))
            else:
                self._wait(request, ())
        return refused

    def _wait(self, request: Request, executors: Sequence[Executor]) -> None:
        if not executors:
            self.stranded[request.order] = request
            return
        mask = 0
        for executor in executors:
            mask |= executor.bit
        lane = self._lanes.get(mask)
        if lane is None:
            self._drop_empty_lanes()
            team = self._teams[mask] = team_of(executors, self._rules.policy)
            lane = self._lanes[mask] = Lane(mask, self._shares, team.home_role)
        lane.push(request)

    def _drop_empty_lanes(self) -> None:
        for mask in [mask for mask, lane in self._lanes.items() if not lane]:
            del self._lanes[mask], self._teams[mask]

    def _left(self, request: Request) -> None:
        self._queued -= 1
        self.queued_tokens -= request.tokens
        tenant = request.needs.tenant
        left = self._tenants[tenant] - 1
        if left:
            self._tenants[tenant] = left
        else:
            del self._tenants[tenant]


def _in_turn(heads: list[_Head]) -> list[_Head]:
    """Lanes in the order of their first requests' turns. Of one tenant's, that of higher priority goes first."""
    arrived: dict[tuple[int, str], int] = {}
    for (rank, _, request), _ in heads:
        turn = (rank, request.needs.tenant)
        arrived[turn] = min(request.order, arrived.get(turn, request.order))

    def key(head: _Head) -> tuple[int, int, int, int, int]:
        rank, virtual, request = head[0]
        return rank, virtual, arrived[rank, request.needs.tenant], -request.needs.priority, request.order

    return sorted(heads, key=key)
