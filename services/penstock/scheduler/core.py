"""The scheduler's core: soft state alone, driven by calls and a clock; it knows neither gRPC nor messages.

Inputs change the state; `step` places what can be placed, lets expire what has expired, and tells what came of it. The caller
steps after its inputs, and again at `next_wake`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from penstock.scheduler.admission import retry_after
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.executors import Executor
from penstock.scheduler.leases import Leases
from penstock.scheduler.model import Grant, Needs, Outcome, Reason, Refused
from penstock.scheduler.placement import Placement, Rules
from penstock.scheduler.pool import Pool
from penstock.scheduler.registry import Registry
from penstock.scheduler.requests import Request, load_tokens
from penstock.scheduler.routing import Unsupported
from penstock.scheduler.timers import Timers

__all__ = ["Scheduler"]

# How long a request that every executor has lost waits before it is given to one of them again. A dead executor's stream ends
# within this, and the pool changes.
_SECOND_LOOK_SECONDS = 0.5

# When to try again a request whose executors have not come back in time. It would wait for them anew.
_AFTER_NO_EXECUTOR_SECONDS = 1.0


class Scheduler:
    """Decides where and when requests run.

    Args:
        config: limits and waiting times.
        clock: tells monotonic seconds.
    """

    def __init__(self, config: SchedulerConfig, clock: Callable[[], float]) -> None:
        self._config = config
        self._rules = Rules(config.placement, config.prefill_weight, config.expected_output_tokens)
        self._clock = clock
        self._settled_at = clock() + config.settle_seconds
        # Until then a model that has not been heard of may be one that was served before the start.
        self._knows_models_at = clock() + max(config.settle_seconds, config.model_memory_seconds)
        self._gateways: dict[int, dict[int, Request]] = {}
        self._opened = 0
        self._arrivals = 0
        self._pools: dict[str, Pool] = {}
        self._dirty: dict[Pool, None] = {}
        self._deadlines: Timers[Request] = Timers(clock())
        self._patience: Timers[Request] = Timers(clock())
        self._outcomes: list[Outcome] = []
        self.executors = Registry(config, clock, self._changed, self._freed)
        self._leases = Leases(self.executors)

    @property
    def pools(self) -> Mapping[str, Pool]:
        """By model."""
        return self._pools

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return sum(pool.queued for pool in self._pools.values())

    def open_gateway(self) -> int:
        """A number for a gateway's stream."""
        self._opened += 1
        self._gateways[self._opened] = {}
        return self._opened

    def close_gateway(self, gateway: int) -> None:
        """The stream has ended: all that was asked and leased on it is free."""
        for request_id in list(self._gateways[gateway]):
            self.release(gateway, request_id)
        del self._gateways[gateway]

    def announce(
        self, gateway: int, request_id: int, executor_id: str, *, tokens: int, choices: int, prefill: tuple[str, int] | None = None
    ) -> None:
        """Take over a lease that was granted on a stream which was lost, or by a scheduler which is gone.

        `prefill`: the executor where its prefill still runs, if that is another one, and the tokens that are held against it.
        """
        self.release(gateway, request_id)
        request = self._request(gateway, request_id, Needs(model="", choices=max(choices, 1)), tokens)
        self._gateways[gateway][request_id] = request
        self._leases.announce(request, executor_id, tokens, prefill)

    def place(self, gateway: int, request_id: int, needs: Needs) -> None:
        """Ask for an executor. What the request id stood for before is released."""
        self.release(gateway, request_id)
        request = self._request(gateway, request_id, needs, load_tokens(needs, self._config.expected_output_tokens))
        if needs.deadline is not None and needs.deadline <= 0:
            self._refuse(request, Reason.DEADLINE, "the deadline passed before the request was queued")
            return
        pool = self._pool_for(needs)
        if pool is None:
            self._refuse(request, Reason.UNKNOWN_MODEL, self._unknown(needs.model))
            return
        self._queue(pool, request)

    def release(self, gateway: int, request_id: int) -> None:
        """The request needs no place any more, queued or leased; unknown ones are none."""
        request = self._gateways[gateway].pop(request_id, None)
        if request is None:
            return
        if request.hold is not None:
            self._leases.free(request)
        else:
            self._pools[request.needs.model].remove(request)
            self._dirty[self._pools[request.needs.model]] = None
            self._clear_timers(request)

    def prefilled(self, gateway: int, request_id: int) -> None:
        """The executor that prefills for a request is done with it; where there is none, nothing changes."""
        request = self._gateways[gateway].get(request_id)
        if request is not None:
            self._leases.free_prefill(request)

    def step(self) -> list[Outcome]:
        """Do all that can be done now; what came of it since the last step, in order."""
        now = self._clock()
        self._outcomes += self.executors.expire(now)
        for request in self._deadlines.due(now):
            self._expire(request)
        for request in self._patience.due(now):
            self._give_up(request)
        while self._dirty:
            pool, _ = self._dirty.popitem()
            self._dispatch(pool, now)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    @property
    def settles_at(self) -> float | None:
        """Until when executors may still have to register since the start; None: that is over."""
        return self._settled_at if self._clock() < self._settled_at else None

    def next_wake(self) -> float | None:
        """When `step` has something to do even if nothing comes in; None: never."""
        times = (self._deadlines.next_due(), self._patience.next_due(), self.executors.next_expiry())
        return min((t for t in times if t is not None), default=None)

    def _request(self, gateway: int, request_id: int, needs: Needs, tokens: int) -> Request:
        self._arrivals += 1
        return Request(gateway, request_id, needs, order=self._arrivals, arrived=self._clock(), tokens=tokens)

    def _pool_for(self, needs: Needs) -> Pool | None:
        pool = self._pools.get(needs.model)
        now = self._clock()
        if pool is not None and pool.known and not pool.live and not pool.queued:
            if now - pool.last_seen <= self._config.model_memory_seconds:
                return pool
            del self._pools[needs.model]
            pool = None
        if pool is None and (needs.replacing or now < self._knows_models_at):
            pool = self._pool(needs.model)
        return pool

    def _pool(self, model: str) -> Pool:
        pool = self._pools.get(model)
        if pool is None:
            pool = Pool(model, self.executors.prefixes, self._rules, self._clock())
            self._pools[model] = pool
        return pool

    def _queue(self, pool: Pool, request: Request) -> None:
        needs = request.needs
        executors = pool.route(needs)
        patience = self._config.executor_wait_seconds
        if isinstance(executors, Unsupported):
            if request.arrived >= self._settled_at:
                self._refuse(request, Reason.UNSUPPORTED, executors.message, field=executors.field)
                return
            executors, patience = (), 0.0
        elif executors and all(e.description.executor_id in needs.avoid for e in executors):
            executors, patience = (), _SECOND_LOOK_SECONDS
        if not needs.replacing and not self._has_room(pool, request):
            message = f"too many requests wait for model {needs.model!r}; try again later"
            rate = pool.drain_rate.per_second(request.arrived)
            self._refuse(request, Reason.QUEUE_FULL, message, retry=retry_after(pool.queued, rate))
            return
        self._gateways[request.gateway][request.request_id] = request
        pool.enqueue(request, executors)
        if request.deadline is not None:
            request.deadline_tick = self._deadlines.add(request, request.deadline)
        if not executors:
            self._strand(request, max(request.arrived + patience, self._settled_at))
        self._dirty[pool] = None

    def _has_room(self, pool: Pool, request: Request) -> bool:
        config, tenant = self._config, request.needs.tenant
        limits = (config.max_queued_requests, config.max_queued_tokens)
        if pool.admits(tenant, request.tokens, *limits):
            return True
        self._dispatch(pool, request.arrived)
        return pool.admits(tenant, request.tokens, *limits)

    def _strand(self, request: Request, until: float) -> None:
        """Give up on the request if no executor has come by then."""
        if request.stranded_tick is not None:
            self._patience.discard(request, request.stranded_tick)
        request.stranded_tick = self._patience.add(request, until)

    def _dispatch(self, pool: Pool, now: float) -> None:
        while (found := pool.next_placement(now)) is not None:
            request, placement = found
            self._clear_timers(request)
            if request.deadline is not None and request.deadline <= now:
                del self._gateways[request.gateway][request.request_id]
                self._refuse(request, Reason.DEADLINE, "the deadline passed in the queue")
                continue
            pool.drain_rate.mark(now)
            self._grant(request, placement, now)
        self._forget_if_idle(pool)

    def _grant(self, request: Request, placement: Placement, now: float) -> None:
        needs, description = request.needs, placement.executor.description
        prefill = self._leases.grant(request, placement)
        if prefill is not None:
            placement.executor.unreached.tries(prefill.executor_id, now)
        self._outcomes.append(
            Grant(
                request.gateway,
                request.request_id,
                needs.model,
                description.executor_id,
                description.address,
                request.leased_tokens,
                needs.choices,
                now - request.arrived,
                placement.cached_tokens,
                placement.reason,
                prefill,
                needs.traceparent,
                needs.client_request_id,
            )
        )

    def _freed(self, executor: Executor) -> None:
        self._dirty[self._pools[executor.description.model]] = None

    def _changed(self, model: str) -> None:
        """Executors of a model came, left, or began to drain."""
        pool = self._pool(model)
        pool.live = {e.description.executor_id: e for e in self.executors.of_model(model)}
        if pool.live:
            pool.known = True
        pool.last_seen = self._clock()
        before = set(pool.stranded)
        for request, why in pool.rebuild(strict=pool.last_seen >= self._settled_at):
            self._drop(request)
            self._refuse(request, Reason.UNSUPPORTED, why.message, field=why.field)
        for order, request in pool.stranded.items():
            if order not in before:
                self._strand(request, self._clock() + self._config.executor_wait_seconds)
        self._dirty[pool] = None

    def _expire(self, request: Request) -> None:
        request.deadline_tick = None
        self._take_out(request)
        self._refuse(request, Reason.DEADLINE, "the deadline passed in the queue")

    def _give_up(self, request: Request) -> None:
        request.stranded_tick = None
        if request.lane is not None:
            return  # an executor came
        pool = self._pools[request.needs.model]
        verdict = pool.route(request.needs)
        waits_until = request.arrived + self._config.executor_wait_seconds
        if request.needs.avoid and not isinstance(verdict, Unsupported) and (verdict or self._clock() < waits_until):
            pool.remove(request)
            pool.enqueue(request, verdict)
            if not verdict:
                self._strand(request, waits_until)
            self._dirty[pool] = None
            return
        self._take_out(request)
        if isinstance(verdict, Unsupported):
            self._refuse(request, Reason.UNSUPPORTED, verdict.message, field=verdict.field)
        else:
            message = _none_came(request.needs.model, pool)
            self._refuse(request, Reason.NO_EXECUTOR, message, retry=_AFTER_NO_EXECUTOR_SECONDS)

    def _take_out(self, request: Request) -> None:
        pool = self._pools[request.needs.model]
        pool.remove(request)
        self._drop(request)
        self._dirty[pool] = None

    def _drop(self, request: Request) -> None:
        del self._gateways[request.gateway][request.request_id]
        self._clear_timers(request)

    def _clear_timers(self, request: Request) -> None:
        if request.deadline_tick is not None:
            self._deadlines.discard(request, request.deadline_tick)
            request.deadline_tick = None
        if request.stranded_tick is not None:
            self._patience.discard(request, request.stranded_tick)
            request.stranded_tick = None

    def _forget_if_idle(self, pool: Pool) -> None:
        if not pool.known and not pool.queued:
            self._pools.pop(pool.model, None)

    def _unknown(self, model: str) -> str:
        served = ", ".join(sorted(name for name, pool in self._pools.items() if pool.live))
        return f"model {model[:200]!r} is not served here" + (f"; there is {served}" if served else "")

    def _refuse(self, request: Request, reason: Reason, message: str, *, field: str = "", retry: float = 0.0) -> None:
        needs, waited = request.needs, self._clock() - request.arrived
        identity = (needs.traceparent, needs.client_request_id)
        self._outcomes.append(
            Refused(request.gateway, request.request_id, needs.model, reason, message, field, retry, waited, *identity)
        )


def _none_came(model: str, pool: Pool) -> str:
    if pool.placeable:
        return f"no executor of model {model!r} has the tokenizer that the prompt was encoded with"
    return f"model {model!r} has no executor now; try again later"
