"""The process that renders chat templates. A template is a program: only another process can be stopped, and bounded in memory.

Frames on stdin and stdout: four bytes of length (big endian), one byte of kind, the content. The first frame in is the template
and its limits as JSON, and is answered by the names that the template reads, as a JSON list; each later one holds its variables as
JSON and is answered by one frame, of the kinds of `Kind`. A rendering that takes longer than its processor time ends the process,
by the kernel's hand (SIGPROF), and so does the end of stdin.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from enum import IntEnum
from typing import Any, BinaryIO

from jinja2 import Template
from jinja2.exceptions import TemplateError

from penstock.tokenizer.chat_template import compile_template, variables_of

__all__ = ["HEADER", "Kind", "main"]

HEADER = struct.Struct(">IB")

_COMPILE_SECONDS = 2.0


class Kind(IntEnum):
    """What a frame of the worker holds."""

    RENDERED = 0
    # The template itself refused, by raise_exception; its text.
    REFUSED = 1
    # The template could not be rendered for any other reason; for the log.
    FAILED = 2
    TOO_LARGE = 3
    OUT_OF_MEMORY = 4


def main() -> None:
    """Serve stdin until it ends."""
    source, target = sys.stdin.buffer, sys.stdout.buffer
    setup = json.loads(_read(source) or b"{}")
    memory = int(setup["memory_bytes"])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # in a background group, a terminal would stop it for what it writes to stderr
    # Constant expressions are worked out here.
    signal.setitimer(signal.ITIMER_PROF, max(setup["seconds"], _COMPILE_SECONDS))
    try:
        template, variables = compile_template(setup["template"]), variables_of(setup["template"])
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the template is told
        _write(target, Kind.FAILED, f"{type(error).__name__}: {error}")
        return
    _write(target, Kind.RENDERED, json.dumps(sorted(variables)))
    while (request := _read(source)) is not None:
        signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
        kind, text = _render(template, request, setup["output_characters"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(target, kind, text)


def _render(template: Template, request: bytes, limit: int) -> tuple[Kind, str]:
    try:
        variables: dict[str, Any] = json.loads(request)
        parts, size = [], 0
        for part in template.generate(variables):
            parts.append(part)
            size += len(part)
            if size > limit:
                return Kind.TOO_LARGE, ""
        return Kind.RENDERED, "".join(parts)
    except MemoryError:
        return Kind.OUT_OF_MEMORY, ""
    except TemplateError as error:
        # The kinds of it speak of jinja's own; the plain one is the template's raise_exception.
        return Kind.REFUSED if type(error) is TemplateError else Kind.FAILED, str(error)
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        return Kind.FAILED, f"{type(error).__name__}: {error}"


def _read(source: BinaryIO) -> bytes | None:
    header = source.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    return source.read(HEADER.unpack(header)[0])


def _write(target: BinaryIO, kind: Kind, text: str) -> None:
    content = text.encode("utf-8", "replace")
    target.write(HEADER.pack(len(content), kind) + content)
    target.flush()


if __name__ == "__main__":
    main()
