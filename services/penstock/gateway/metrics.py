"""What the gateway tells Prometheus, under vLLM's names where the meaning is the same.

What an engine counts too, in sequences where the gateway counts requests, has the gateway's name: a sum over the suite counts
nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from penstock.common.metrics import E2E_SECONDS, INTER_TOKEN_SECONDS, TIME_TO_FIRST_TOKEN_SECONDS
from penstock.gateway.answer import FinishReason
from penstock.gateway.machine import Request
from penstock.gateway.states import State

__all__ = ["GatewayMetrics"]

_MODEL = ("model_name",)


class GatewayMetrics:
    """The gateway's registry. Everything is counted once a request or once a message, never once a token."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token", TIME_TO_FIRST_TOKEN_SECONDS)
        self._between = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between a request's tokens", INTER_TOKEN_SECONDS
        )
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the last token", E2E_SECONDS)
        self._queue = self._histogram("request_queue_time_seconds", "Time before the first engine step", E2E_SECONDS)
        self._success = self._counter("request_success", "Choices by how they finished", "finished_reason")
        self._failed = self._counter("request_failed", "Requests that failed, by the error's name", "error")
        self._prompt = self._counter("gateway_prompt_tokens", "Prompt tokens of completed requests")
        self._generated = self._counter("gateway_generation_tokens", "Tokens told to clients")
        self._cached = self._counter("gateway_prompt_tokens_cached", "Prompt tokens found in a prefix cache")
        self._replacements = self._counter("request_replacements", "Placements after an executor was lost")
        self._placed = self._counter("requests_placed", "Leases, by whether prefill ran apart, and why", "how", "reason")
        self._fallbacks = self._counter("fallbacks", "Handoffs and executors that were lost to a running request", "reason")
        self._parts = Histogram(
            "penstock_time_to_first_token_part_seconds",
            "Where the time to the first text, and from the first token to the second, went",
            (*_MODEL, "part"),
            buckets=TIME_TO_FIRST_TOKEN_SECONDS,
            registry=self.registry,
        )

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A figure that is read when it is asked for."""
        Gauge(f"penstock_{name}", text, registry=self.registry).set_function(value)

    def done(self, request: Request) -> None:
        """A request has ended, one way or another."""
        model, now = request.plan.model, request.now()
        generated = sum(choice.told_tokens for choice in request.choices)
        self._generated.labels(model).inc(generated)
        if request.record.replacements:
            self._replacements.labels(model).inc(request.record.replacements)
        for apart, why in request.record.placements:
            self._placed.labels(model, "apart" if apart else "together", why.value).inc()
        for _, lost, _ in request.record.fallbacks:
            self._fallbacks.labels(model, lost.value).inc()
        for part, seconds in request.record.parts.items():
            self._parts.labels(model, part).observe(max(0.0, seconds))  # a histogram's sum may not fall
        if request.record.first_token_at is not None:
            self._first.labels(model).observe(request.record.first_token_at - request.record.arrived)
            longest = max(choice.told_tokens for choice in request.choices)
            if longest > 1 and request.record.last_token_at is not None:
                self._between.labels(model).observe((request.record.last_token_at - request.record.first_token_at) / (longest - 1))
        if request.error is not None:
            self._failed.labels(model, type(request.error).__name__).inc()
            return
        self._whole.labels(model).observe(now - request.record.arrived)
        self._queue.labels(model).observe(request.record.queue_seconds)
        self._prompt.labels(model).inc(len(request.plan.prompt_ids))
        self._cached.labels(model).inc(request.record.cached_tokens)
        for choice in request.choices:
            reason = choice.finish.reason if choice.finish is not None else FinishReason.DEADLINE
            self._success.labels(model, reason.value).inc()

    def watch(self, live: Mapping[int, Request]) -> None:
        """Tell how many requests run and wait."""
        waiting = (State.QUEUED, State.PREFILLING)
        self.gauge(
            "gateway_requests_running", "Requests that tell tokens", lambda: sum(r.state not in waiting for r in live.values())
        )
        self.gauge("gateway_requests_waiting", "Requests before a token", lambda: sum(r.state in waiting for r in live.values()))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"penstock_{name}", text, _MODEL, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"penstock_{name}", text, (*_MODEL, *labels), registry=self.registry)
