"""Backends by name: built-in modules, and others by the entry-point group ``penstock.backends``."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points

from penstock.backends.contract import (
    Availability,
    Available,
    Broken,
    Capabilities,
    DeviceConfig,
    DType,
    GenerativeModel,
    ModelSpec,
    Registration,
    Unsupported,
)
from penstock.common.service import StartError

__all__ = ["AUTO", "BackendReport", "DuplicateBackend", "NoBackend", "backends", "describe", "select"]

AUTO = "auto"
GROUP = "penstock.backends"

# In the order in which `auto` prefers them on the same kind of device. Each module has a `REGISTRATION`.
_BUILT_IN: Mapping[str, str] = {
    "openvino": "penstock.backends.openvino",
    "torch": "penstock.backends.pytorch",
    "fake": "penstock.backends.fake",
}
# Answers of this one are made up: it is taken by its name alone.
_NEVER_AUTO = frozenset({"fake"})


class NoBackend(StartError):
    """No backend serves a model, or not the one that was asked for: one line with every reason."""


class DuplicateBackend(StartError):
    """Two backends have the same name."""


@dataclass(frozen=True, slots=True)
class BackendReport:
    """A line of ``penstock backends``. `capabilities` is None where no model was named or the backend is not available."""

    name: str
    availability: Availability
    capabilities: Capabilities | Unsupported | None


def backends(plugins: Sequence[EntryPoint] | None = None) -> Mapping[str, Registration]:
    """Every backend by name, built-in ones first. One that can not be imported is there too, and its probe says why.

    Args:
        plugins: entry points of others; None: the installed ones of the group ``penstock.backends``.

    Raises:
        DuplicateBackend: two have the same name.
    """
    found: dict[str, Registration] = {}
    for name, module in _BUILT_IN.items():
        found[name] = _load(name, lambda module=module: importlib.import_module(module).REGISTRATION)
    for point in entry_points(group=GROUP) if plugins is None else plugins:
        registration = _load(point.name, point.load)
        if registration.name in found:
            raise DuplicateBackend(
                f"two backends are named {registration.name}: uninstall the one from {point.value}, or rename it"
            )
        found[registration.name] = registration
    return found


def select(
    spec: ModelSpec,
    name: str = AUTO,
    dtype: DType | None = None,
    *,
    among: Mapping[str, Registration] | None = None,
) -> tuple[Registration, Capabilities]:
    """The backend that is to run a model.

    `auto` takes the first that is available and can, those with an accelerator before those without, and otherwise in the order
    openvino, torch, others; never `fake`.

    Raises:
        NoBackend: with the reason of every backend that was considered.
    """
    known = backends() if among is None else among
    if name != AUTO and name not in known:
        raise NoBackend(f"there is no backend {name}; there are {', '.join(known)}")
    candidates = [r for r in known.values() if r.name == name or (name == AUTO and r.name not in _NEVER_AUTO)]
    usable: list[tuple[bool, Registration, Capabilities]] = []
    reasons: list[str] = []
    for registration in candidates:
        answer = _consider(registration, spec, dtype)
        if isinstance(answer, str):
            reasons.append(f"{registration.name}: {answer}")
        else:
            devices, capabilities = answer
            usable.append((devices[0] == "cpu", registration, capabilities))
    if not usable:
        raise NoBackend(f"no backend can run {spec.name}: {'; '.join(reasons)}")
    _, registration, capabilities = min(usable, key=lambda candidate: candidate[0])
    return registration, capabilities


def describe(model: ModelSpec | None = None, *, among: Mapping[str, Registration] | None = None) -> list[BackendReport]:
    """Every backend, where it runs and what it can do for a model, or why it can't."""
    reports = []
    for registration in (backends() if among is None else among).values():
        availability = registration.probe()
        asked = registration.capabilities(model) if model is not None and isinstance(availability, Available) else None
        reports.append(BackendReport(registration.name, availability, asked))
    return reports


def _consider(registration: Registration, spec: ModelSpec, dtype: DType | None) -> tuple[tuple[str, ...], Capabilities] | str:
    availability = registration.probe()
    if not isinstance(availability, Available):
        kind = "broken" if isinstance(availability, Broken) else "unavailable"
        return f"{kind}: {availability.reason}"
    capabilities = registration.capabilities(spec)
    if isinstance(capabilities, Unsupported):
        return capabilities.reason
    if dtype is not None and dtype not in capabilities.dtypes:
        return f"has no {dtype} for it, but {', '.join(capabilities.dtypes)}"
    return availability.devices, capabilities


def _load(name: str, load: Callable[[], object]) -> Registration:
    try:
        loaded = load()
    except Exception as error:  # noqa: BLE001  what a plug-in raises on import is not known; it is told, not hidden
        return _broken(name, f"import failed: {type(error).__name__}: {error}")
    if not isinstance(loaded, Registration):
        return _broken(name, f"gives a {type(loaded).__name__}, not a Registration")
    if loaded.name != name:
        return _broken(name, f"registered as {name}, but calls itself {loaded.name}")
    return loaded


def _broken(name: str, reason: str) -> Registration:
    return Registration(
        name=name,
        probe=partial(Broken, reason),
        capabilities=lambda _: Unsupported(reason),
        create=partial(_refuse, reason),
    )


def _refuse(reason: str, _spec: ModelSpec, _config: DeviceConfig) -> GenerativeModel:
    raise NoBackend(reason)
