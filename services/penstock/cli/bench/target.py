"""What is measured: something that runs requests and tells what happened to each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.cli.bench.scenarios import Request
from penstock.cli.bench.timeline import Timeline

__all__ = ["UNKNOWN", "Description", "Target", "of_all"]

# Where a server does not tell its precision or backend.
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Description:
    """What runs the requests: the fields that each result bears."""

    engine: str
    version: str
    dtype: str
    backend: str
    vocabulary: int


class Target(Protocol):
    """An engine or a suite. Used by one caller at a time."""

    @property
    def description(self) -> Description:
        """What it is."""

    def run(self, requests: Sequence[Request], finished: Callable[[], None]) -> list[Timeline]:
        """Send each request at its time, and return when the last has ended; `finished` is called at the end of each."""

    def close(self) -> None:
        """Give everything back."""


def of_all(names: Iterable[str]) -> str:
    """What all executors have, with a plus between where they differ."""
    return "+".join(sorted({one or UNKNOWN for one in names})) or UNKNOWN
