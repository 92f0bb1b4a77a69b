"""Which processes make a local cluster, and the command line of each."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from penstock.cli.cluster.child import Program
from penstock.cli.cluster.pools import ExecutorPlan
from penstock.cli.cluster.settings import UpConfig

__all__ = ["Plan"]

_LOOPBACK = "127.0.0.1:0"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A local cluster.

    Attributes:
        served_name: what clients call the model.
        folder: the model's files.
        settings: what the user asked for.
        doors: where the gateway listens, by the name of the door.
        config: a file with sections for services, which they read themselves; or None.
        metrics: where services behind the gateway tell their metrics, of those to which the user gave an address.
        console: whether logs are for a person, where the format is left to the terminal.
    """

    served_name: str
    folder: Path
    settings: UpConfig
    doors: Mapping[str, str]
    config: Path | None = None
    metrics: Mapping[str, str] = field(default_factory=dict)
    console: bool = False

    def scheduler(self) -> Program:
        """The scheduler's process."""
        return self._program("scheduler", "scheduler", self._given(("placement",)), self._inner("scheduler"))

    def tokenizer(self) -> Program:
        """The tokenizer's process."""
        models = ["--models", f"{self.served_name}={self.folder}"]
        return self._program("tokenizer", "tokenizer", models, self._inner("tokenizer"))

    def gateway(self, *, scheduler: str, tokenizer: str) -> Program:
        """The gateway's process, which knows where these two listen."""
        listen = {name: (f"--{name}", address) for name, address in self.doors.items()}
        flags = ["--scheduler", scheduler, "--tokenizer", tokenizer, *self._given(("event_log",))]
        return self._program("gateway", "gateway", flags, listen)

    def executor(self, planned: ExecutorPlan, *, scheduler: str, joins: bool = False) -> Program:
        """An executor's process, which registers with this scheduler; one that joins others leaves them the port for metrics."""
        flags = [
            *("--model", str(self.folder), "--served-name", self.served_name, "--scheduler", scheduler, "--role", planned.role),
            *self._of_pool(planned, ("backend", "dtype", "kv_cache_dtype")),
            *self._given(("kv_cache_gib", "max_batch_tokens", "max_batch_size", "prefix_cache")),
            *_flag("kv-cache-share", planned.kv_cache_share),
            *_flag("threads", planned.threads),
        ]
        listen = self._inner("executor")
        if joins:
            flag, address = listen["metrics"]
            listen["metrics"] = (flag, address.rpartition(":")[0] + ":0")
        return self._program(planned.name, "executor", flags, listen)

    def _of_pool(self, planned: ExecutorPlan, keys: Sequence[str]) -> list[str]:
        """Flags for settings that a pool may have of its own, such as prefill_backend."""
        flags = []
        for key in keys:
            own = None if planned.pool == "both" else getattr(self.settings, f"{planned.pool}_{key}")
            flags += self._given((key,)) if own is None else _flag(key.replace("_", "-"), own)
        return flags

    def _inner(self, service: str) -> dict[str, tuple[str, str]]:
        """Where a service behind the gateway listens."""
        return {"grpc": ("--listen", _LOOPBACK), "metrics": ("--metrics", self.metrics.get(service, _LOOPBACK))}

    def _program(self, name: str, service: str, flags: Sequence[str], listen: dict[str, tuple[str, str]]) -> Program:
        log_format = "console" if self.console and self.settings.log_format == "auto" else self.settings.log_format
        common = [
            *(["--config", str(self.config)] if self.config else []),
            *self._given(("log_level", "otlp_endpoint", "grace_seconds")),
            *([] if log_format == "auto" else ["--log-format", log_format]),
        ]
        argv = (sys.executable, "-m", "penstock.cli", service, *flags, *common)
        return Program(name=name, service=service, argv=argv, listen=listen)

    def _given(self, keys: Sequence[str]) -> list[str]:
        """Flags for what was said to the cluster itself."""
        return [word for key, value in self.settings.own(keys).items() for word in _flag(key.replace("_", "-"), value)]


def _flag(name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [] if value is None else [f"--{name}", str(value)]
