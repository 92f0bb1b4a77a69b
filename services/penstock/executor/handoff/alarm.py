"""One timer for many deadlines, most of which move on before they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

__all__ = ["Alarm"]


class Alarm:
    """Calls `ring` when the earliest time has come that was asked for; `ring` does what is due and tells the next time, if any.

    A deadline that has moved on costs one ring that does nothing. Of one event loop, whose clock it goes by.
    """

    def __init__(self, ring: Callable[[], float | None]) -> None:
        self._ring = ring
        self._timer: asyncio.TimerHandle | None = None

    def by(self, when: float | None) -> None:
        """Ring at that time, or before."""
        if when is None or (self._timer is not None and self._timer.when() <= when):
            return
        self.stop()
        self._timer = asyncio.get_running_loop().call_at(when, self._rings)

    def stop(self) -> None:
        """Do not ring any more, unless asked again."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _rings(self) -> None:
        self._timer = None
        self.by(self._ring())
