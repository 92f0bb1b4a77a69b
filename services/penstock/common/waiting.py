"""What a service says while it waits for another: once that it does, and once that it need not any more."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable

from penstock.common.logs import logger

__all__ = ["Waiting", "tell_waiting"]

# What starts together finds itself, and what dies is started again, before that.
_PATIENCE_SECONDS = 1.5
_QUIET_SECONDS = 30.0
_LOOK_SECONDS = 0.25


class Waiting:
    """Tells of another service's absences in the log, by what it is shown of them.

    Args:
        service: the other's name.
        address: where it should be, HOST:PORT.
        clock: seconds that grow.
        patience: seconds that an absence lasts before it is told.
        quiet: seconds between two that are told, at least.
    """

    def __init__(
        self,
        service: str,
        address: str,
        clock: Callable[[], float] = time.monotonic,
        patience: float = _PATIENCE_SECONDS,
        quiet: float = _QUIET_SECONDS,
    ) -> None:
        self._facts = {"waits_for": service, "address": address}
        self._clock = clock
        self._patience = patience
        self._quiet = quiet
        self._away_since: float | None = None
        self._told_at = -math.inf
        self._told = False

    def look(self, *, reached: bool) -> None:
        """Note whether the other serves now, and tell what has to be told."""
        now = self._clock()
        if reached:
            if self._told and self._away_since is not None:
                logger().info("reached", **self._facts, after_seconds=round(now - self._away_since, 3))
            self._told, self._away_since = False, None
            return
        if self._away_since is None:
            self._away_since = now
        if not self._told and now - self._away_since >= self._patience and now - self._told_at >= self._quiet:
            logger().warning("waits: not reachable, or not serving yet", **self._facts)
            self._told, self._told_at = True, now


async def tell_waiting(service: str, address: str, reached: Callable[[], bool]) -> None:
    """Tell of a service's absences until cancelled.

    Args:
        service: its name.
        address: where it should be, HOST:PORT.
        reached: whether it serves now.
    """
    waiting = Waiting(service, address)
    while True:
        waiting.look(reached=reached())
        await asyncio.sleep(_LOOK_SECONDS)
