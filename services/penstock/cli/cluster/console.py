"""What is seen of a cluster: its own messages and each process's lines, for a person or as JSON."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from itertools import cycle
from typing import TextIO

__all__ = ["Console"]

_COLOURS = ("36", "33", "35", "32", "34", "31")
_WIDTH = 10
_SUPERVISOR = "up"


class Console:
    """Writes lines to one stream.

    Args:
        stream: where to.
        as_json: every line is a JSON object, with the keys of the services' logs. Otherwise it stands behind the name of its
            process, which is in a colour of its own on a terminal.
    """

    def __init__(self, stream: TextIO, *, as_json: bool = False) -> None:
        self._stream = stream
        self._as_json = as_json
        self._colours = cycle(_COLOURS)
        self._prefixes: dict[str, str] = {}

    def line(self, name: str, text: str, *, level: str = "info", event: str | None = None, **facts: object) -> None:
        """Tell something of the process of this name.

        Args:
            name: the process; ``up`` is the supervisor itself.
            text: for a person.
            level: of the event.
            event: what JSON calls it, with `facts` in place of the text; the text itself where absent.
            facts: see `event`.
        """
        if self._as_json:
            of = {} if name == _SUPERVISOR else {"process": name}
            self._event(event or text, **facts, service=_SUPERVISOR, **of, level=level)
        else:
            self._write(f"{self._prefix(name)} {text}")

    def said(self, name: str, service: str, line: str) -> None:
        """Pass a line on that the process of this name has written. As JSON, one that is no object becomes an event."""
        if not self._as_json:
            self._write(f"{self._prefix(name)} {line}")
        elif _is_object(line):
            self._write(line)
        elif line.strip():
            self._event(line, service=service, process=name, level="warning")

    def failed(self, why: str) -> None:
        """Tell why the cluster ends."""
        if self._as_json:
            self._event("failed", why=why, service=_SUPERVISOR, level="error")
        else:
            self._write(f"penstock {_SUPERVISOR}: {why}")

    def _event(self, event: str, **facts: object) -> None:
        now = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        self._write(json.dumps({"event": event, **facts, "timestamp": now}))

    def _write(self, line: str) -> None:
        # A full disk costs lines. Were it to end who passes them on, every process would stand with its first full pipe.
        with contextlib.suppress(OSError):
            self._stream.write(f"{line}\n")
            self._stream.flush()

    def _prefix(self, name: str) -> str:
        if name not in self._prefixes:
            plain = f"{name:<{_WIDTH}} |"
            self._prefixes[name] = f"\x1b[{next(self._colours)}m{plain}\x1b[0m" if self._stream.isatty() else plain
        return self._prefixes[name]


def _is_object(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
