"""Backends by name, built in or by the entry-point group ``penstock.backends``; which one runs a model, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from penstock.backends.apart.model import registration_apart
from penstock.backends.contract import Available, Capabilities, DType, ModelSpec, Registration
from penstock.backends.discovery import DuplicateBackend, NoBackend, Source, sources
from penstock.backends.inspection import PROBE_SECONDS, BackendReport, inspect
from penstock.backends.ranking import Speeds, Standing, Verdict, no_speeds, rank

__all__ = [
    "AUTO",
    "BackendReport",
    "DuplicateBackend",
    "NoBackend",
    "Selection",
    "backends",
    "describe",
    "select",
    "sources",
    "standings",
]

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Selection:
    """The backend that is to run a model.

    Attributes:
        registration: how it is made; of another package's backend, how it is made in a process of its own.
        version: of its library.
        device: where it runs.
        dtype: that it runs: the one that was asked for, or its own first.
        standings: of all that were considered, the chosen one included.
    """

    registration: Registration
    capabilities: Capabilities
    version: str
    device: str
    dtype: DType
    standings: tuple[Standing, ...]


def backends(among: Mapping[str, Source] | None = None) -> Mapping[str, Registration]:
    """Every backend by name, imported into this process: for tests and the conformance suite. To serve, `select`.

    One that can not be imported is there too, and its probe says why.

    Raises:
        DuplicateBackend: two have the same name.
    """
    return {name: source.registration() for name, source in (sources() if among is None else among).items()}


def select(
    spec: ModelSpec,
    name: str = AUTO,
    dtype: DType | None = None,
    kv_dtype: DType | None = None,
    *,
    among: Mapping[str, Source] | None = None,
    speeds: Speeds = no_speeds,
    seconds: float = PROBE_SECONDS,
) -> Selection:
    """The backend that is to run a model.

    `auto` takes what is available and can, those with an accelerator before those without; of these the fastest as far as both were
    measured with this model here, and otherwise in the order in which `sources` gives them, those that yield last; never `fake`.

    Args:
        spec: the model.
        name: of the backend, or `auto`.
        dtype: None: each backend's own first.
        kv_dtype: of the KV cache; None: each backend's own choice.
        among: the backends; None: all that are installed.
        speeds: what was measured.
        seconds: that a backend has to say what it is.

    Raises:
        NoBackend: with the reason of every backend that was considered.
    """
    known = sources() if among is None else among
    if name != AUTO and name not in known:
        raise NoBackend(f"there is no backend {name}; there are {', '.join(known)}")
    asked = list(known.values()) if name == AUTO else [known[name]]
    judged = rank(inspect(asked, spec, seconds), dtype, kv_dtype, speeds, auto=name == AUTO)
    best = next((s for s in judged if s.verdict is Verdict.CHOSEN), None)
    if best is None or best.dtype is None:
        raise NoBackend(f"no backend can run {spec.name}: {'; '.join(_refusal(s) for s in judged)}")
    capabilities, availability = best.report.capabilities, best.report.availability
    if not isinstance(capabilities, Capabilities) or not isinstance(availability, Available):
        raise TypeError(f"{best.report.name} was chosen and can not run")
    source = known[best.report.name]
    registration = source.registration() if source.built_in else registration_apart(best.report)
    return Selection(registration, capabilities, availability.version, availability.devices[0], best.dtype, tuple(judged))


def describe(
    model: ModelSpec | None = None, *, among: Mapping[str, Source] | None = None, seconds: float = PROBE_SECONDS
) -> list[BackendReport]:
    """Every backend, where it runs and what it can do for a model, or why it can't."""
    return inspect((sources() if among is None else among).values(), model, seconds)


def standings(
    model: ModelSpec,
    dtype: DType | None = None,
    kv_dtype: DType | None = None,
    *,
    among: Mapping[str, Source] | None = None,
    speeds: Speeds = no_speeds,
    seconds: float = PROBE_SECONDS,
) -> list[Standing]:
    """Every backend as `auto` sees it for a model."""
    return rank(describe(model, among=among, seconds=seconds), dtype, kv_dtype, speeds, auto=True)


def _refusal(standing: Standing) -> str:
    verdict, name = standing.verdict, standing.report.name
    said = f"{verdict}: " if verdict in {Verdict.BROKEN, Verdict.UNAVAILABLE} else ""
    return f"{name}: {said}{standing.reason}"
