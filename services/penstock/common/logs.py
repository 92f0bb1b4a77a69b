"""Logs: structlog, to stderr, as JSON or for a console. `request_id` is bound by the interceptors and follows a request."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

__all__ = ["LogFormat", "LogLevel", "configure", "logger"]

LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def configure(service: str, level: str = "info", fmt: LogFormat = "auto") -> None:
    """Set this process's logs up. ``auto`` is for a console where stderr is a terminal, and JSON elsewhere."""
    as_json = fmt == "json" or (fmt == "auto" and not sys.stderr.isatty())
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            *([structlog.processors.format_exc_info] if as_json else []),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s", force=True)


def logger() -> structlog.stdlib.BoundLogger:
    """The logger of this process: an event's name first, then its facts as keywords. To stderr also where nothing was set up."""
    if not structlog.is_configured():  # structlog's own default is stdout, where commands print what they are asked for
        structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    bound: structlog.stdlib.BoundLogger = structlog.get_logger()
    return bound
