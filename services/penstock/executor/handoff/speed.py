"""How much KV goes over one stream in a second."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["LinkSpeed"]

# Less tells how long a message takes on its way, and not how much goes through.
_LEAST_BYTES = 1 << 20
# A stream that is never idle is measured in such pieces.
_ENOUGH_BYTES = 256 << 20


class LinkSpeed:
    """Measures while something is under way: from a push until its payload stands in the cache of the other side.

    The time in which nothing could go, since prefill had yet to compute it, is no time of the link, and neither is that of copying
    out. Waiting for the end of a step of the engine that decodes is: KV enters between two.

    Args:
        measured: told of each measurement, in bytes per second.
    """

    def __init__(self, measured: Callable[[float], None]) -> None:
        self._measured = measured
        self._under_way = 0
        self._bytes = 0
        self._since = 0.0
        self._whole = True

    def pushed(self, size: int, now: float) -> None:
        """Payload goes."""
        if not self._under_way:
            self._begin(now)
        self._under_way += size

    def answered(self, size: int, now: float, *, arrived: bool) -> None:
        """So much is not under way any more: it has arrived, or was dropped, and then nothing is known of the time that it took."""
        self._under_way -= size
        self._bytes += size
        self._whole &= arrived
        if self._bytes < _ENOUGH_BYTES and self._under_way:
            return
        if self._whole and self._bytes >= _LEAST_BYTES and now > self._since:
            self._measured(self._bytes / (now - self._since))
        self._begin(now)

    def _begin(self, now: float) -> None:
        self._bytes = 0
        self._since = now
        self._whole = True
