"""What a person sees of a cluster: each process's lines behind its name, in a colour of its own on a terminal."""

from __future__ import annotations

from itertools import cycle
from typing import TextIO

__all__ = ["Console"]

_COLOURS = ("36", "33", "35", "32", "34", "31")
_WIDTH = 10


class Console:
    """Writes prefixed lines to one stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._colours = cycle(_COLOURS)
        self._prefixes: dict[str, str] = {}

    def line(self, name: str, text: str) -> None:
        """Write one line of the process of this name."""
        self._stream.write(f"{self._prefix(name)} {text}\n")
        self._stream.flush()

    def _prefix(self, name: str) -> str:
        if name not in self._prefixes:
            plain = f"{name:<{_WIDTH}} |"
            self._prefixes[name] = f"\x1b[{next(self._colours)}m{plain}\x1b[0m" if self._stream.isatty() else plain
        return self._prefixes[name]
