"""Logs: structlog, to stderr, as JSON or for a console. `request_id` is bound by the interceptors and follows a request."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, Processor

__all__ = ["LogFormat", "LogLevel", "are_json", "configure", "logger"]

LogFormat = Literal["auto", "console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def are_json(fmt: LogFormat) -> bool:
    """Whether this process's logs are JSON lines. ``auto`` is for a console where stderr is a terminal, and JSON elsewhere."""
    return fmt == "json" or (fmt == "auto" and not sys.stderr.isatty())


def configure(service: str, level: str = "info", fmt: LogFormat = "auto", process: str | None = None) -> None:
    """Set this process's logs up, those of libraries too.

    Args:
        service: stands in every line.
        level: least level of the lines that are written; a library's are warnings and worse.
        fmt: as `are_json` takes it.
        process: name of this process among others of a supervisor; stands in every line of JSON.
    """
    as_json = are_json(fmt)
    source = {"service": service, **({"process": process} if as_json and process else {})}

    def told_by(_: object, __: str, event: EventDict) -> EventDict:
        return {**event, **source}

    renderer: Processor = (
        structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    stamps: list[Processor] = [
        told_by,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        *([structlog.processors.format_exc_info] if as_json else []),
    ]
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, *stamps, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        # It writes a line in one piece, also beside those of libraries.
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _Lenient(sys.stderr))),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s %(name)s %(message)s", force=True)
    logging.captureWarnings(as_json)
    if as_json:
        formatter = structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *stamps],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
        for handler in logging.getLogger().handlers:
            handler.setFormatter(formatter)


class _Lenient:
    """A stream whose failures stop nobody: a full disk costs lines, and not what they would have told of."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def logger() -> structlog.stdlib.BoundLogger:
    """The logger of this process: an event's name first, then its facts as keywords. To stderr also where nothing was set up."""
    if not structlog.is_configured():  # structlog's own default is stdout, where commands print what they are asked for
        structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))
    bound: structlog.stdlib.BoundLogger = structlog.get_logger()
    return bound
