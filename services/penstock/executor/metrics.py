"""Prometheus metrics of an executor, under vLLM's names where the meaning is the same. Read from the engine when scraped."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from penstock.common.metrics import INTER_TOKEN_SECONDS, STEP_TOKENS
from penstock.executor.engine import Engine
from penstock.executor.meter import StepFacts

__all__ = ["ExecutorMetrics"]


class ExecutorMetrics(Collector):
    """The counts of one engine, in a registry of their own."""

    def __init__(self, engine: Engine, model: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model}
        self.registry = CollectorRegistry()
        self.registry.register(self)
        names = list(self._labels)
        self._step_seconds = Histogram(
            "penstock_step_seconds", "Time of one engine step.", names, buckets=INTER_TOKEN_SECONDS, registry=self.registry
        ).labels(model)
        self._step_tokens = Histogram(
            "penstock_iteration_tokens_total", "Tokens of one engine step.", names, buckets=STEP_TOKENS, registry=self.registry
        ).labels(model)
        self._gaps = _Gaps()
        engine.meter.on_step = self._observe

    def _observe(self, facts: StepFacts) -> None:
        self._gaps.observe(time.monotonic(), facts.next_tokens)
        self._step_seconds.observe(facts.seconds)
        self._step_tokens.observe(facts.decodes + facts.prompt_tokens)

    def collect(self) -> Iterator[Metric]:
        """The engine's state at this moment."""
        engine, meter, counts = self._engine, self._engine.meter, self._engine.planner.counts
        blocks = engine.blocks.counts()
        yield self._gauge("num_requests_running", "Sequences that run.", len(engine.planner.running))
        yield self._gauge("num_requests_waiting", "Sequences that wait.", len(engine.planner.waiting))
        yield self._gauge("kv_cache_usage_perc", "Share of the KV blocks in use, 1 is all.", blocks.used / engine.blocks.count)
        states = GaugeMetricFamily("penstock_kv_blocks", "KV blocks by state.", labels=[*self._labels, "state"])
        for state, count in (("used", blocks.used), ("cached", blocks.cached), ("free", blocks.free)):
            states.add_metric([*self._labels.values(), state], count)
        yield states
        yield self._counter("prompt_tokens", "Prompt tokens of sequences that gave a first token.", meter.prompted)
        yield self._counter("generation_tokens", "Output tokens.", meter.generated)
        yield self._counter("prefix_cache_queries", "Tokens looked for in the prefix cache.", counts.prefix_queries)
        yield self._counter("prefix_cache_hits", "Tokens found there.", counts.prefix_hits)
        yield self._counter("num_preemptions", "Sequences whose blocks were taken.", counts.preemptions)
        finished = CounterMetricFamily("penstock_sequences_finished", "By reason.", labels=[*self._labels, "finished_reason"])
        for reason, count in meter.finished.items():
            finished.add_metric([*self._labels.values(), reason.value], count)
        yield finished
        latency = HistogramMetricFamily(
            "penstock_inter_token_latency_seconds", "Time from a sequence's token to its next.", labels=list(self._labels)
        )
        latency.add_metric(list(self._labels.values()), self._gaps.buckets(), self._gaps.total)
        yield latency

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"penstock_{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"penstock_{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


class _Gaps:
    """Times between tokens. All that a step continues have waited for as long, so a step is one observation with a weight."""

    def __init__(self) -> None:
        self.total = 0.0
        self._counts = [0] * (len(INTER_TOKEN_SECONDS) + 1)
        self._last = 0.0

    def observe(self, now: float, tokens: int) -> None:
        """A step has ended that gave the next token of so many sequences."""
        gap, self._last = now - self._last, now
        if tokens:
            self._counts[bisect_left(INTER_TOKEN_SECONDS, gap)] += tokens
            self.total += tokens * gap

    def buckets(self) -> list[tuple[str, float]]:
        """Counts up to each bound, as Prometheus tells them."""
        bounds = [*map(str, INTER_TOKEN_SECONDS), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
