"""How a gateway is set up."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from penstock.common.logs import LogFormat, LogLevel
from penstock.common.service import StartError

__all__ = ["GatewayConfig", "check_origins"]

# As browsers send it: no path, no slash behind it.
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s,]+", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """The gateway: the only door, and the owner of each request.

    Attributes:
        http: HOST:PORT of the OpenAI HTTP door; port 0 takes a free one.
        grpc: HOST:PORT of the gRPC door; port 0 takes a free one.
        tokenizer: HOST:PORT of the tokenizer service.
        scheduler: HOST:PORT of the scheduler service.
        api_keys: YAML file that maps each API key to its tenant; without one, everybody is tenant "default".
        max_tokens_per_request: New tokens that one request may ask for, over all its prompts and choices.
        max_choices: Choices of one prompt at most.
        max_prompts: Prompts of one HTTP request at most.
        max_live_requests: Requests in work at once; more are refused with a time to try again.
        max_http_connections: HTTP connections open at once, within three quarters of the files that the process may open.
        max_head_bytes: Largest request line and headers of an HTTP request.
        head_seconds: Time in which an HTTP request's line and headers have to come.
        max_body_bytes: Largest HTTP body and gRPC message that is taken.
        body_seconds: Time in which an HTTP body has to come.
        cors_origins: Origins of web pages whose scripts may use the HTTP door, as https://chat.example.com; * is every one.
        default_deadline_seconds: Time for a request whose client set no deadline.
        sse_keepalive_seconds: A comment is sent on an event stream that has been silent for so long.
        slow_reader_seconds: A client that takes nothing of waiting output for so long is cut off.
        model_memory_seconds: Time for which a model whose executors are all gone stays known, and requests for it wait.
        max_attempts: Executors that a request is tried on without a new token before it fails.
        log_level: Least level of the log lines that are written.
        log_format: Console or JSON lines; auto is console on a terminal.
        metrics: HOST:PORT of a Prometheus endpoint beside the HTTP door's /metrics.
        event_log: File to which everything that happens to a request is appended, a line of JSON each; none where absent.
        otlp_endpoint: URL of an OpenTelemetry collector that speaks OTLP over gRPC.
        grace_seconds: Time that running requests get to finish in when the gateway drains.
    """

    http: str = "127.0.0.1:8000"
    grpc: str = "127.0.0.1:8001"
    tokenizer: str = "127.0.0.1:8011"
    scheduler: str = "127.0.0.1:8012"
    api_keys: str | None = None
    max_tokens_per_request: int = 262_144
    max_choices: int = 16
    max_prompts: int = 256
    max_live_requests: int = 4_096
    max_http_connections: int = 8_192
    max_head_bytes: int = 64 << 10
    head_seconds: float = 10.0
    max_body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    cors_origins: tuple[str, ...] = ()
    default_deadline_seconds: float = 600.0
    sse_keepalive_seconds: float = 10.0
    slow_reader_seconds: float = 60.0
    model_memory_seconds: float = 300.0
    max_attempts: int = 5
    log_level: LogLevel = "info"
    log_format: LogFormat = "auto"
    metrics: str | None = None
    event_log: str | None = None
    otlp_endpoint: str | None = None
    grace_seconds: float = 30.0


def check_origins(origins: Iterable[str]) -> None:
    """Refuse what no browser would ever send as a page's origin.

    Raises:
        StartError: one is none; names it.
    """
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise StartError(f"cors_origins: {origin!r} is no origin: give SCHEME://HOST or SCHEME://HOST:PORT, or * for every one")
