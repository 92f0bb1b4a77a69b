"""One command for each service, as a container runs it: its settings are the fields of its configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Protocol

from cyclopts import Parameter

from penstock.cli.start import Start
from penstock.common import faults, lifecycle, logs
from penstock.common.service import Service
from penstock.executor.config import ExecutorConfig
from penstock.gateway.config import GatewayConfig
from penstock.scheduler.config import SchedulerConfig
from penstock.tokenizer.config import TokenizerConfig

__all__ = ["executor", "gateway", "scheduler", "tokenizer"]


class _Common(Protocol):
    @property
    def log_level(self) -> str: ...
    @property
    def log_format(self) -> logs.LogFormat: ...
    @property
    def grace_seconds(self) -> float: ...


def _run(name: str, settings: _Common, start: Start, assemble: Callable[[], Service]) -> int:
    if start.supervisor_fd is not None:
        lifecycle.die_with(start.supervisor_fd)
    logs.configure(name, settings.log_level, settings.log_format, start.process)
    if start.faults is not None:
        faults.arm(start.faults)
    return lifecycle.run(assemble(), settings.grace_seconds)


def gateway(
    *,
    start: Annotated[Start, Parameter(name="*")] = Start(),
    settings: Annotated[GatewayConfig, Parameter(name="*")] = GatewayConfig(),
) -> int:
    """Run the gateway: the only door, and the owner of each request."""

    def assemble() -> Service:
        from penstock.gateway.server import GatewayServer

        return GatewayServer(settings)

    return _run("gateway", settings, start, assemble)


def tokenizer(
    *,
    start: Annotated[Start, Parameter(name="*")] = Start(),
    settings: Annotated[TokenizerConfig, Parameter(name="*")] = TokenizerConfig(),
) -> int:
    """Run a tokenizer service: chat templates, text to ids, ids to text."""

    def assemble() -> Service:
        from penstock.tokenizer.server import TokenizerServer

        return TokenizerServer(settings)

    return _run("tokenizer", settings, start, assemble)


def scheduler(
    *,
    start: Annotated[Start, Parameter(name="*")] = Start(),
    settings: Annotated[SchedulerConfig, Parameter(name="*")] = SchedulerConfig(),
) -> int:
    """Run the scheduler: where and when requests run."""

    def assemble() -> Service:
        from penstock.scheduler.server import SchedulerServer

        return SchedulerServer(settings)

    return _run("scheduler", settings, start, assemble)


def executor(
    *,
    start: Annotated[Start, Parameter(name="*")] = Start(),
    settings: Annotated[ExecutorConfig, Parameter(name="*")] = ExecutorConfig(),
) -> int:
    """Run an executor: one model on one backend."""

    def assemble() -> Service:
        from penstock.executor.server import ExecutorServer

        return ExecutorServer(settings)

    return _run("executor", settings, start, assemble)
