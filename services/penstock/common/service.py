"""What every service is to the command line that starts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

__all__ = ["Service", "StartError"]


class Service(Protocol):
    """One service of the suite, assembled from its configuration. `close` follows in every case, also after a failed `start`."""

    name: str

    async def start(self) -> Mapping[str, str]:
        """Load, bind and serve.

        Returns:
            where it listens, by protocol: ``{"grpc": "127.0.0.1:8001"}``.

        Raises:
            StartError: it can not serve; the text is one line that says why and what to do.
        """

    async def wait(self) -> None:
        """Return when the service can not go on by itself; raise why."""

    async def drain(self) -> None:
        """Tell NOT_SERVING, admit nothing more, and return when what runs has finished."""

    async def close(self) -> None:
        """End at once and give everything back. Idempotent."""


class StartError(Exception):
    """A service can not start: one line, for the person who started it."""
