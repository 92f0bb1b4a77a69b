"""Ratios, whether they meet their bars, and the tables of docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from peers.catalog import Bar, Contest, bar, share_bar
from penstock.cli.bench.scenarios import Scenario

__all__ = ["Comparison", "as_fields", "tables"]


@dataclass
class Comparison:
    """Rounds of one scenario on a peer and on one of ours, in turn.

    Attributes:
        ours: ``suite`` (over gRPC) or ``engine`` (in process).
        peer_seconds, our_seconds: by round.
        shares: of the machine's read bandwidth, by round, where that was asked for.
        waiting_cores: processor time that the waiting one used, in cores; the greatest of all rounds.
    """

    contest: Contest
    ours: str
    scenario: Scenario
    peer_seconds: list[float] = field(default_factory=list)
    our_seconds: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    waiting_cores: float = 0.0

    @property
    def tokens(self) -> int:
        """What rates are of: new tokens, or those of the prompt where one new token ends the work."""
        s = self.scenario
        return s.requests * (s.new_tokens if s.new_tokens > 1 else s.prompt_tokens)

    @property
    def ratios(self) -> list[float]:
        """Our speed over the peer's, by round."""
        return [theirs / own for theirs, own in zip(self.peer_seconds, self.our_seconds, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def share(self) -> float | None:
        return statistics.median(self.shares) if self.shares else None

    def rate(self, seconds: Sequence[float]) -> float:
        """Tokens per second in the median round."""
        return self.tokens / statistics.median(seconds)


def verdict(value: float, against: Bar | None) -> str:
    """What a table says of a figure and its bar."""
    if against is None:
        return ""
    if value < against.least:
        return "**not met**"
    return "met, reach met" if against.reach is not None and value >= against.reach else "met"


def as_fields(comparison: Comparison) -> dict[str, Any]:
    """One flat object of JSON."""
    c = comparison
    against = bar(c.contest, c.scenario.name)
    fields = {
        "peer": c.contest.peer,
        "precision": c.contest.precision,
        "backend": c.contest.backend,
        "dtype": c.contest.dtype,
        "ours": c.ours,
        "scenario": c.scenario.name,
        "rounds": len(c.ratios),
        "peer_tok_s": round(c.rate(c.peer_seconds), 1),
        "our_tok_s": round(c.rate(c.our_seconds), 1),
        "ratio": round(c.ratio, 3),
        "ratio_min": round(min(c.ratios), 3),
        "ratio_max": round(max(c.ratios), 3),
        "bar": against.least if against else None,
        "met": c.ratio >= against.least if against else None,
        "waiting_cores": round(c.waiting_cores, 3),
    }
    if c.share is not None:
        fields["bandwidth_share"] = round(c.share, 3)
    return fields


def tables(comparisons: Sequence[Comparison]) -> str:
    """All results as Markdown: a row a scenario, and one a share of bandwidth."""
    lines = [
        "| peer | ours | scenario | peer, tok/s | ours, tok/s | ratio, median (least, greatest) | bar | |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(_row(comparison) for comparison in comparisons),
    ]
    shares = list(_shares(comparisons))
    if shares:
        lines += [
            "",
            "| one sequence | share of bandwidth, median (least, greatest) | bar | |",
            "| --- | --- | --- | --- |",
        ]
    return "\n".join([*lines, *shares])


def _row(c: Comparison) -> str:
    against = bar(c.contest, c.scenario.name)
    cells = [
        f"{c.contest.peer} {c.contest.precision}",
        f"{c.ours}, {c.contest.backend} {c.contest.dtype}",
        c.scenario.name,
        f"{c.rate(c.peer_seconds):.1f}",
        f"{c.rate(c.our_seconds):.1f}",
        f"{c.ratio:.2f} ({min(c.ratios):.2f}, {max(c.ratios):.2f})",
        f"{against.least:g}" if against else "",
        verdict(c.ratio, against),
    ]
    return f"| {' | '.join(cells)} |"


def _shares(comparisons: Iterable[Comparison]) -> Iterable[str]:
    for c in comparisons:
        if c.share is not None:
            against = share_bar(c.contest)
            spread = f"{c.share:.2f} ({min(c.shares):.2f}, {max(c.shares):.2f})"
            least = f"{against.least:.2f}" if against else ""
            yield f"| {c.ours}, {c.contest.backend} {c.contest.dtype} | {spread} | {least} | {verdict(c.share, against)} |"
