"""Runs work on a target and makes one flat object of each result."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.cli.bench.scenarios import Poisson, Scenario, warm_up
from penstock.cli.bench.target import Target
from penstock.cli.bench.timeline import Slo, Timeline, latencies, meets
from penstock.common.service import StartError

__all__ = ["Result", "closed_loop", "failures", "open_loop", "warm"]

_FIGURES = re.compile(r"\d+")
_MOST_KINDS = 3


@dataclass(frozen=True, slots=True)
class Result:
    """The fields that are printed, and the ids of each request's answer."""

    fields: dict[str, Any]
    ids: list[list[int]]


def warm(target: Target) -> None:
    """Run a little, untimed."""
    _check(target.run(warm_up(target.description.vocabulary), _nothing))


def closed_loop(target: Target, scenario: Scenario, repeats: int, finished: Callable[[], None]) -> Result:
    """The best of `repeats` runs, each over other prompts; the ids are those of the first run.

    Raises:
        StartError: a request failed, so that the work was not the work that is compared.
    """
    best: list[Timeline] = []
    first: list[Timeline] = []
    for seed in range(repeats):
        timelines = target.run(scenario.work(seed, target.description.vocabulary), finished)
        _check(timelines)
        first = first or timelines
        if not best or _seconds(timelines) < _seconds(best):
            best = timelines
    seconds = _seconds(best)
    out = scenario.requests * scenario.new_tokens
    total = scenario.requests * (scenario.prompt_tokens + scenario.new_tokens)
    fields = {"scenario": scenario.name, "seconds": round(seconds, 3), **_rates(out, total, seconds), **latencies(best)}
    return Result({**_described(target), **fields}, [t.ids for t in first])


def open_loop(target: Target, load: Poisson, slo: Slo, seed: int, finished: Callable[[], None]) -> Result:
    """One run under arrivals that do not wait for answers. A request that fails counts as one that was not answered in time."""
    requests = load.work(seed, target.description.vocabulary)
    if not requests:
        raise StartError(f"--rate {load.rate:g} for --duration {load.duration:g} s brings no request; raise one of them")
    timelines = target.run(requests, finished)
    good = [(r, t) for r, t in zip(requests, timelines, strict=True) if t.error is None]
    seconds = _seconds(timelines)
    fields = {
        "scenario": "poisson",
        "rate": load.rate,
        "duration": load.duration,
        "seconds": round(seconds, 3),
        "requests": len(requests),
        "failed": len(requests) - len(good),
        "errors": failures(timelines),
        **_rates(sum(len(t.ids) for _, t in good), sum(len(r.prompt) + len(t.ids) for r, t in good), seconds),
        **latencies(timelines),
        "slo_ttft_ms": round(slo.ttft * 1000, 3),
        "slo_itl_ms": round(slo.itl * 1000, 3),
        "goodput_req_s": round(sum(meets(t, slo) for t in timelines) / seconds, 3),
    }
    return Result({**_described(target), **fields}, [t.ids for t in timelines])


def _described(target: Target) -> dict[str, Any]:
    d = target.description
    return {"engine": d.engine, "version": d.version, "dtype": d.dtype, "backend": d.backend}


def _seconds(timelines: Sequence[Timeline]) -> float:
    return max(t.ended for t in timelines) - min(t.sent for t in timelines)


def _rates(out: int, total: int, seconds: float) -> dict[str, float]:
    return {"out_tok_s": round(out / seconds, 1), "total_tok_s": round(total / seconds, 1)}


def _check(timelines: Sequence[Timeline]) -> None:
    errors = [t.error for t in timelines if t.error is not None]
    if errors:
        raise StartError(f"{len(errors)} of {len(timelines)} requests failed; the first: {errors[0]}")


def failures(timelines: Sequence[Timeline]) -> list[dict[str, Any]]:
    """The first kinds of errors, each with its first text and its requests. Texts that differ in figures alone are of one kind."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for error in (t.error for t in timelines if t.error is not None):
        kind = _FIGURES.sub("#", error)
        first.setdefault(kind, error)
        counts[kind] += 1
    return [{"error": text, "requests": counts[kind]} for kind, text in list(first.items())[:_MOST_KINDS]]


def _nothing() -> None:
    pass
