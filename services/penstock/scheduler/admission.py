"""How much may wait: pure rules over counts, and the measured rate at which the queue drains."""

from __future__ import annotations

import math

__all__ = ["DrainRate", "admits", "retry_after"]

_SHORTEST, _LONGEST, _UNKNOWN = 0.1, 30.0, 1.0


def admits(queued: int, limit: int, own: int, tenants: int) -> bool:
    """Whether one more may wait.

    The last tenth of the queue is for tenants that hold less than an equal part of it, counting one tenant more than there are: a
    flood of one tenant's requests fills the queue for itself alone.

    Args:
        queued: requests that wait.
        limit: requests that may wait at most.
        own: those of them that are the tenant's.
        tenants: tenants that have requests waiting.
    """
    if queued >= limit:
        return False
    if queued < limit - limit // 10:
        return True
    return own * (tenants + 1) < limit


def retry_after(queued: int, per_second: float) -> float:
    """Seconds until a tenth of the queue is likely to have left it."""
    if per_second <= 0:
        return _UNKNOWN
    return min(max(0.1 * queued / per_second, _SHORTEST), _LONGEST)


class DrainRate:
    """Placements per second, averaged exponentially over the last ten seconds or so."""

    _WINDOW = 10.0

    def __init__(self, now: float) -> None:
        self._weight = 0.0
        self._since = now
        self._last = now

    def mark(self, now: float) -> None:
        """One request was placed."""
        if now > self._last:
            self._weight *= math.exp((self._last - now) / self._WINDOW)
            self._last = now
        self._weight += 1.0

    def per_second(self, now: float) -> float:
        """The rate. It is 0 before the first placement."""
        decayed = self._weight * math.exp((self._last - now) / self._WINDOW)
        observed = 1.0 - math.exp((self._since - now) / self._WINDOW)
        return decayed / (self._WINDOW * max(observed, 1e-3))
