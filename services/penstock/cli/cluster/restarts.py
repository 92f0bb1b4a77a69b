"""When a process that died is started again, and when that is given up."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Backoff", "RestartPolicy"]


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How often and how fast a process is started again.

    Attributes:
        limit: deaths in a row after which nothing is started any more.
        first_delay: seconds before the first restart; each further one in a row waits twice as long.
        longest_delay: seconds that a restart waits at most.
        healthy_after: seconds of serving after which a death is the first in a row again.
    """

    limit: int = 5
    first_delay: float = 0.2
    longest_delay: float = 30.0
    healthy_after: float = 120.0


class Backoff:
    """Counts one process's deaths in a row."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self.deaths = 0

    def after_death(self, served_seconds: float) -> float | None:
        """Seconds to wait before the next start; None where the limit is reached."""
        if served_seconds >= self._policy.healthy_after:
            self.deaths = 0
        self.deaths += 1
        if self.deaths > self._policy.limit:
            return None
        return float(min(self._policy.first_delay * 2 ** (self.deaths - 1), self._policy.longest_delay))
