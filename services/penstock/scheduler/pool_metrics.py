"""What Prometheus is told of each pool, the executors of one model that are given the same to do: what a pool is scaled by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from prometheus_client.core import GaugeMetricFamily, Metric

from penstock.scheduler.executors import Executor

__all__ = ["pool_metrics"]

_LABELS = ["model_name", "role"]


@dataclass(slots=True)
class _Pool:
    states: dict[str, int] = field(default_factory=lambda: {"live": 0, "draining": 0})
    halves: dict[str, int] = field(default_factory=lambda: {"prefill": 0, "decode": 0})
    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0
    leased_tokens: int = 0
    blocks: int = 0
    blocks_free: int = 0

    def add(self, executor: Executor) -> None:
        load, hold = executor.load, executor.hold
        self.states["draining" if executor.draining else "live"] += 1
        self.halves["prefill"] += hold.prefill_leases
        self.halves["decode"] += hold.leases - hold.prefill_leases
        self.running += load.running
        self.waiting += load.waiting
        self.prompt_tokens += executor.ahead
        self.leased_tokens += hold.tokens
        self.blocks += executor.description.kv_blocks
        self.blocks_free += load.kv_blocks_free


def pool_metrics(executors: Iterable[Executor]) -> Iterator[Metric]:
    """The sums over each pool's executors, from their last reports and the leases that are held."""
    pools: dict[tuple[str, str], _Pool] = {}
    for executor in executors:
        pools.setdefault((executor.description.model, executor.role.value), _Pool()).add(executor)
    states = GaugeMetricFamily("penstock_scheduler_executors", "Registered executors.", labels=[*_LABELS, "state"])
    halves = GaugeMetricFamily("penstock_pool_leases", "Leases on the pool, by what they are for.", labels=[*_LABELS, "half"])
    for labels, pool in pools.items():
        for state, count in pool.states.items():
            states.add_metric([*labels, state], count)
        for half, count in pool.halves.items():
            halves.add_metric([*labels, half], count)
    yield states
    yield halves
    yield _gauge("requests_running", "Sequences that run.", {k: p.running for k, p in pools.items()})
    yield _gauge("requests_waiting", "Sequences that wait in the executors.", {k: p.waiting for k, p in pools.items()})
    yield _gauge("waiting_prompt_tokens", "Prompt tokens that wait for prefill.", {k: p.prompt_tokens for k, p in pools.items()})
    yield _gauge("leased_tokens", "Tokens that are leased.", {k: p.leased_tokens for k, p in pools.items()})
    used = {k: 1 - p.blocks_free / p.blocks for k, p in pools.items()}
    yield _gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 1 is all.", used)


def _gauge(name: str, text: str, values: dict[tuple[str, str], float]) -> Metric:
    family = GaugeMetricFamily(f"penstock_pool_{name}", text, labels=_LABELS)
    for labels, value in values.items():
        family.add_metric(list(labels), value)
    return family
