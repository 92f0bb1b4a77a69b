"""Which backend runs a model, and for each other one why it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from penstock.backends.contract import Available, Broken, Capabilities, DType, Task, Unsupported
from penstock.backends.inspection import BackendReport

__all__ = ["Speed", "Speeds", "Standing", "Verdict", "no_speeds", "rank", "rivals"]

# Answers of this one are made up: it is taken by its name alone.
_BY_NAME_ALONE = frozenset({"fake"})


class Verdict(StrEnum):
    """What became of a backend in a choice. `BEHIND` is of the ones that could, and were not measured against the chosen one."""

    CHOSEN = "chosen"
    SLOWER = "slower"
    BEHIND = "not measured"
    NAMED_ONLY = "by name alone"
    UNSUPPORTED = "unsupported"
    UNAVAILABLE = "unavailable"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a backend was with a model on this machine.

    Attributes:
        prefill: prompt tokens per second.
        decode: output tokens per second of `batch` sequences.
        alone: of one.
        seconds: of the work that speeds are compared by.
    """

    prefill: float
    decode: float
    alone: float
    batch: int
    seconds: float

    def __str__(self) -> str:
        decode = f"decode {self.alone:,.0f} tokens/s, {self.decode:,.0f} at batch {self.batch}"
        return f"prefill {self.prefill:,.0f} tokens/s, {decode}"


Speeds = Callable[[BackendReport, DType], Speed | None]


def no_speeds(_: BackendReport, __: DType) -> None:
    """Where nothing was measured."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A backend in a choice.

    Attributes:
        reason: why it is not chosen, or what speaks for it.
        dtype: the one that it would run; None where it can not.
        speed: at that dtype, where it was measured.
    """

    report: BackendReport
    verdict: Verdict
    reason: str = ""
    dtype: DType | None = None
    speed: Speed | None = None


def rank(
    reports: Sequence[BackendReport],
    dtype: DType | None,
    kv_dtype: DType | None = None,
    speeds: Speeds = no_speeds,
    *,
    auto: bool,
) -> list[Standing]:
    """Judge backends, given in the order that holds where nothing was measured; at most one is chosen.

    Those with an accelerator go before those without. Within a kind the first that does not yield stands, until another one was
    measured to be faster.

    Args:
        reports: with capabilities for the model.
        dtype: the one that is asked for; None: each one's own first.
        kv_dtype: the one that is asked for of the KV cache; None: each backend's own choice.
        speeds: what was measured.
        auto: whether the choice is free; else the one report there is was named.
    """
    standings = [_judge(report, dtype, kv_dtype, speeds, auto=auto) for report in reports]
    able = [s for s in standings if s.verdict is Verdict.CHOSEN]
    if not able:
        return standings
    accelerated = [s for s in able if _accelerated(s)]
    best, *others = sorted(accelerated or able, key=lambda s: bool(_yielding(s)))
    for other in others:
        if best.speed is not None and other.speed is not None and other.speed.seconds < best.speed.seconds:
            best = other
    taken = replace(best, reason=_merit(best, able) if auto else "was asked for by its name")
    return [taken if s is best else _beaten(s, best) if s in able else s for s in standings]


def rivals(standings: Sequence[Standing]) -> list[Standing]:
    """Those between which speed decides: the chosen one and others that could, on accelerators where it has one."""
    able = [s for s in standings if s.verdict in {Verdict.CHOSEN, Verdict.SLOWER, Verdict.BEHIND}]
    return [s for s in able if _accelerated(s)] or able


def _judge(report: BackendReport, dtype: DType | None, kv_dtype: DType | None, speeds: Speeds, *, auto: bool) -> Standing:
    """What holds of a backend by itself; `CHOSEN` is one that could be."""
    availability, capabilities = report.availability, report.capabilities
    if not isinstance(availability, Available):
        verdict = Verdict.BROKEN if isinstance(availability, Broken) else Verdict.UNAVAILABLE
        return Standing(report, verdict, availability.reason)
    if not isinstance(capabilities, Capabilities):
        reason = capabilities.reason if isinstance(capabilities, Unsupported) else "was not asked"
        return Standing(report, Verdict.UNSUPPORTED, reason)
    if lack := _lack(capabilities, dtype, kv_dtype):
        return Standing(report, Verdict.UNSUPPORTED, lack)
    runs = dtype or capabilities.dtypes[0]
    if auto and report.name in _BY_NAME_ALONE:
        return Standing(report, Verdict.NAMED_ONLY, "makes its answers up; only --backend with its name takes it", runs)
    return Standing(report, Verdict.CHOSEN, dtype=runs, speed=speeds(report, runs))


def _lack(capabilities: Capabilities, dtype: DType | None, kv_dtype: DType | None) -> str | None:
    """What it has not of what is asked for."""
    if Task.GENERATE not in capabilities.tasks:
        return f"generates nothing with it; its tasks are {', '.join(capabilities.tasks)}"
    if dtype not in (None, *capabilities.dtypes):
        return f"has no {dtype} for it, but {', '.join(capabilities.dtypes)}"
    if kv_dtype not in (None, *capabilities.kv_dtypes):
        others = f", but {', '.join(capabilities.kv_dtypes)}" if capabilities.kv_dtypes else ""
        return f"has no KV cache of {kv_dtype}{others}; leave kv_cache_dtype auto"
    return None


def _accelerated(standing: Standing) -> bool:
    availability = standing.report.availability
    return isinstance(availability, Available) and availability.devices[0] != "cpu"


def _yielding(standing: Standing) -> str:
    """Why it leaves others the way at its dtype; nothing where it does not."""
    capabilities = standing.report.capabilities
    if not isinstance(capabilities, Capabilities) or standing.dtype is None:
        return ""
    return capabilities.yields.get(standing.dtype, "")


def _merit(best: Standing, able: Sequence[Standing]) -> str:
    """What made it the choice."""
    if best.speed is not None:
        return f"measured with this model here: {best.speed} in {best.dtype}"
    if len(able) == 1:
        return "no other one can"
    if _accelerated(best) and not all(_accelerated(s) for s in able):
        return "has an accelerator"
    return "comes first as long as it was not measured with this model here"


def _beaten(standing: Standing, best: Standing) -> Standing:
    name = best.report.name
    if standing.speed is not None and best.speed is not None and best.speed.seconds <= standing.speed.seconds:
        times = standing.speed.seconds / best.speed.seconds
        reason = f"{name} is {times:.2f} times as fast: {best.speed} in {best.dtype}; here {standing.speed} in {standing.dtype}"
        return Standing(standing.report, Verdict.SLOWER, reason, standing.dtype, standing.speed)
    if _accelerated(best) and not _accelerated(standing):
        reason = f"{name} has an accelerator"
    else:
        unmeasured = [s.report.name for s in (best, standing) if s.speed is None]
        were = f"{' and '.join(unmeasured)} {'were' if len(unmeasured) > 1 else 'was'}"
        reason = f"{name} goes before it as long as {were} not measured with this model here; `penstock calibrate` does that"
        if (why := _yielding(standing)) and not _yielding(best):
            reason = f"{why}: {reason}"
    return Standing(standing.report, Verdict.BEHIND, reason, standing.dtype, standing.speed)
