"""What happened to each request, and the figures that follow from it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["Slo", "Timeline", "latencies", "meets", "percentiles"]


@dataclass(slots=True)
class Timeline:
    """One request as its client saw it; times in seconds of one clock.

    Attributes:
        arrivals: (time, tokens) of each message that bore tokens.
        error: why it failed; None where it did not.
    """

    sent: float = 0.0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None

    def bear(self, at: float, ids: Iterable[int]) -> None:
        """Note tokens that came in one message."""
        before = len(self.ids)
        self.ids.extend(ids)
        self.arrivals.append((at, len(self.ids) - before))

    @property
    def ttft(self) -> float:
        """From sending to the first token."""
        return self.arrivals[0][0] - self.sent

    @property
    def e2e(self) -> float:
        """From sending to the end."""
        return self.ended - self.sent

    def gaps(self) -> list[float]:
        """Time between tokens; the tokens of one message share the wait for it evenly."""
        found = [0.0] * (self.arrivals[0][1] - 1) if self.arrivals else []
        for (before, _), (at, tokens) in zip(self.arrivals, self.arrivals[1:], strict=False):
            found += [(at - before) / tokens] * tokens
        return found


@dataclass(frozen=True, slots=True)
class Slo:
    """What a good answer keeps: its first token within `ttft` seconds, and its later ones `itl` seconds apart on average."""

    ttft: float
    itl: float


def meets(timeline: Timeline, slo: Slo) -> bool:
    """Whether a request was answered in full and in time."""
    if timeline.error is not None or not timeline.arrivals:
        return False
    gaps = timeline.gaps()
    return timeline.ttft <= slo.ttft and (not gaps or sum(gaps) / len(gaps) <= slo.itl)


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles in milliseconds; None where there is nothing."""
    if not seconds:
        return None
    p50, p90, p99 = np.percentile(seconds, (50, 90, 99))
    values = {"mean": float(np.mean(seconds)), "p50": p50, "p90": p90, "p99": p99}
    return {name: round(float(value) * 1000, 3) for name, value in values.items()}


def latencies(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Percentiles of the time to the first token, between tokens, and to the end, of the requests that succeeded."""
    good = [t for t in timelines if t.error is None and t.arrivals]
    return {
        "ttft_ms": percentiles([t.ttft for t in good]),
        "itl_ms": percentiles([gap for t in good for gap in t.gaps()]),
        "e2e_ms": percentiles([t.e2e for t in good]),
    }
