"""How a scheduler is set up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from penstock.common.checks import check_numbers
from penstock.common.logs import LogFormat, LogLevel
from penstock.common.service import StartError

__all__ = ["Policy", "SchedulerConfig", "check"]

Policy = Literal["auto", "together", "apart"]

_MAY_BE_ZERO = ("look_ahead", "prefill_weight", "executor_wait_seconds", "model_memory_seconds", "settle_seconds", "grace_seconds")
# An executor says thrice in a lease that it lives.
_LEAST_LEASE_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The scheduler: decides where and when requests run.

    Attributes:
        listen: HOST:PORT of its gRPC services; port 0 takes a free one.
        max_queued_requests: Requests of one model that wait at most; a tenth is kept for tenants that hold little of the queue.
        max_queued_tokens: Tokens of one model's waiting requests at most, prompts and expected answers.
        expected_output_tokens: An answer is taken to be this long where it may be longer, in load and fairness.
        look_ahead: Sequences given to an executor beyond its batch, so that it never waits for the next.
        prefill_weight: Tokens of load that one token to prefill counts for when an executor is chosen.
        placement: Whether a request's prefill runs on an executor of its own: auto decides by what each way is expected to cost,
            together never does, apart does wherever a pair of executors can exchange KV.
        lease_seconds: An executor from which nothing comes for so long is taken for lost.
        executor_wait_seconds: Time that requests wait for an executor when all of their model's are gone.
        model_memory_seconds: Time for which a model whose executors are all gone stays known. For so long after the start, any
            model may be one that was served before.
        settle_seconds: Time after the start in which no request is refused for what the executors that have registered do not
            support, since others still have to.
        log_level: Least level of the log lines that are written.
        log_format: Console or JSON lines; auto is console on a terminal.
        metrics: HOST:PORT of a Prometheus endpoint.
        otlp_endpoint: URL of an OpenTelemetry collector that speaks OTLP over gRPC.
        grace_seconds: Time at most for gateways to hear what was decided when the scheduler drains; beyond a second it waits
            for none.
    """

    listen: str = "127.0.0.1:8012"
    max_queued_requests: int = 16_384
    max_queued_tokens: int = 1 << 26
    expected_output_tokens: int = 256
    look_ahead: int = 2
    prefill_weight: float = 1.0
    placement: Policy = "auto"
    lease_seconds: float = 2.5
    executor_wait_seconds: float = 30.0
    model_memory_seconds: float = 300.0
    settle_seconds: float = 3.0
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    metrics: str | None = None
    otlp_endpoint: str | None = None
    grace_seconds: float = 30.0


def check(config: SchedulerConfig) -> None:
    """Refuse numbers that no scheduler can work with.

    Raises:
        StartError: names the setting and what would be right.
    """
    if config.placement not in get_args(Policy):
        raise StartError(f"placement is {config.placement!r}: it must be one of {', '.join(get_args(Policy))}")
    check_numbers(config, may_be_zero=_MAY_BE_ZERO)
    if config.lease_seconds < _LEAST_LEASE_SECONDS:
        raise StartError(f"lease_seconds is {config.lease_seconds}: it must be {_LEAST_LEASE_SECONDS} or more")
