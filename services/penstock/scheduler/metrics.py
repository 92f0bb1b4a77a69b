"""What a scheduler tells Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.common.metrics import E2E_SECONDS, TIME_TO_FIRST_TOKEN_SECONDS
from penstock.scheduler.core import Scheduler
from penstock.scheduler.model import Grant, Refused
from penstock.scheduler.pool_metrics import pool_metrics

__all__ = ["SchedulerMetrics"]

# A queue is empty most of the time, and as long as a request at worst.
_QUEUE_SECONDS = tuple(sorted({*TIME_TO_FIRST_TOKEN_SECONDS, *E2E_SECONDS}))


class SchedulerMetrics:
    """Counts outcomes, and reads the core's state when asked."""

    def __init__(self, core: Scheduler) -> None:
        self.registry = CollectorRegistry()
        self._core = core
        self._queue_time = Histogram(
            "penstock_scheduler_queue_time_seconds",
            "Time from a request's arrival at the scheduler to its lease.",
            ["model_name"],
            buckets=_QUEUE_SECONDS,
            registry=self.registry,
        )
        self._placements = Counter(
            "penstock_scheduler_placements",
            "Requests that were answered, by outcome: granted, or why not.",
            ["model_name", "outcome"],
            registry=self.registry,
        )
        self._placed = Counter(
            "penstock_scheduler_placed",
            "Requests that were placed: together, or prefill and decode apart; and why.",
            ["model_name", "how", "reason"],
            registry=self.registry,
        )
        self.registry.register(_State(core))

    def placed(self, grant: Grant) -> None:
        """A request has its lease."""
        self._queue_time.labels(grant.model).observe(grant.queued_seconds)
        self._placements.labels(grant.model, "granted").inc()
        self._placed.labels(grant.model, "apart" if grant.prefill else "together", grant.reason.value).inc()

    def refused(self, refused: Refused) -> None:
        """A request got none. Names of models that were never served are a client's, and would grow without bound."""
        pool = self._core.pools.get(refused.model)
        model = refused.model if pool is not None and pool.known else ""
        self._placements.labels(model, refused.reason.value).inc()


class _State(Collector):
    """The core as it is. Scrapes come from another thread, so everything is copied before it is looked at."""

    def __init__(self, core: Scheduler) -> None:
        self._core = core

    def collect(self) -> Iterator[Metric]:
        waiting = GaugeMetricFamily("penstock_scheduler_requests_waiting", "Requests in the queue.", labels=["model_name"])
        tokens = GaugeMetricFamily("penstock_scheduler_waiting_tokens", "Tokens of these.", labels=["model_name"])
        for model, pool in list(self._core.pools.items()):
            if pool.known:
                waiting.add_metric([model], pool.queued)
                tokens.add_metric([model], pool.queued_tokens)
        yield waiting
        yield tokens
        yield self._queues()
        yield from self._executors()
        gaps = CounterMetricFamily("penstock_scheduler_kv_event_gaps", "Times that an executor's KV events were lost.")
        gaps.add_metric([], self._core.executors.gaps)
        yield gaps

    def _queues(self) -> Metric:
        queues = GaugeMetricFamily(
            "penstock_pool_queue", "Requests in the queue that wait for room in a pool.", labels=["model_name", "role"]
        )
        for model, pool in list(self._core.pools.items()):
            for role, count in pool.waiting_by_role().items():
                queues.add_metric([model, role.value], count)
        return queues

    def _executors(self) -> Iterator[Metric]:
        yield from pool_metrics(self._core.executors)
        leases = GaugeMetricFamily("penstock_scheduler_leases", "Leases that are held.", labels=["executor_id"])
        leased = GaugeMetricFamily("penstock_scheduler_leased_tokens", "Tokens of these.", labels=["executor_id"])
        for hold in list(self._core.executors.holds.values()):
            leases.add_metric([hold.executor_id], hold.leases)
            leased.add_metric([hold.executor_id], hold.tokens)
        yield leases
        yield leased
