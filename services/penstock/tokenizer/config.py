"""Configuration of the tokenizer service."""

from __future__ import annotations

from dataclasses import dataclass

from penstock.common.logs import LogFormat, LogLevel

__all__ = ["TokenizerConfig"]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Settings of one tokenizer service.

    Attributes:
        models: A model whose tokenizer is served, as NAME=FOLDER; the folder holds tokenizer.json. Given once for each model.
        listen: HOST:PORT of the gRPC server; port 0 takes a free one.
        metrics: HOST:PORT of the Prometheus endpoint; off where absent.
        otlp_endpoint: URL of an OpenTelemetry collector that speaks OTLP over gRPC.
        log_level: Least level of the log lines that are written.
        log_format: Console or JSON lines; auto is console on a terminal.
        grace_seconds: Seconds that running calls get when the service leaves.
        template_workers: Processes per model that render chat templates.
        template_seconds: Processor seconds that rendering one conversation may take.
        template_memory_mib: Memory of one rendering process, in MiB.
        template_output_mib: Largest rendered conversation, in MiB.
    """

    models: tuple[str, ...] = ()
    listen: str = "127.0.0.1:8011"
    metrics: str | None = None
    otlp_endpoint: str | None = None
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    grace_seconds: float = 30
    template_workers: int = 2
    template_seconds: float = 2
    template_memory_mib: int = 512
    template_output_mib: int = 16
