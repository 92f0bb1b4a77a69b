"""What is measured: something that runs requests and tells what happened to each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.cli.bench.scenarios import Request
from penstock.cli.bench.timeline import Timeline

__all__ = ["Description", "Target"]


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
