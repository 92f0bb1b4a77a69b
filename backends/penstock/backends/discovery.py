"""Where backends are: built-in modules, others by the entry-point group ``penstock.backends``. Finding them imports nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points

from penstock.backends.contract import Broken, DeviceConfig, GenerativeModel, ModelSpec, Registration, Unsupported
from penstock.backends.reports import what_was_raised
from penstock.common.service import StartError

__all__ = ["BUILT_IN", "DuplicateBackend", "NoBackend", "Source", "broken", "sources"]

GROUP = "penstock.backends"

# In the order in which `auto` prefers them on the same kind of device where nothing was measured. Each has a `REGISTRATION`.
BUILT_IN: Mapping[str, str] = {
    "openvino": "penstock.backends.openvino",
    "onnxruntime": "penstock.backends.onnxruntime",
    "torch": "penstock.backends.pytorch",
    "tensorrt": "penstock.backends.tensorrt",
    "fake": "penstock.backends.fake",
}


class NoBackend(StartError):
    """No backend serves a model, or not the one that was asked for: one line with every reason."""


class DuplicateBackend(StartError):
    """Two backends have the same name."""


@dataclass(frozen=True, slots=True)
class Source:
    """A backend that has been found and not yet imported.

    Attributes:
        package: the distribution that brings it and its version; empty for a built-in one.
        load: imports it and gives its `Registration`; may raise anything, never return, or end the process.
    """

    name: str
    package: str
    load: Callable[[], object]

    @property
    def built_in(self) -> bool:
        """Whether it is of this package, and may run in its processes."""
        return not self.package

    def registration(self) -> Registration:
        """Import it into this process. One that raises or gives something else comes back as broken, with the reason."""
        try:
            loaded = self.load()
        except Exception as error:  # noqa: BLE001  what a plug-in raises on import is not known; it is told, not hidden
            return broken(self.name, f"import failed: {what_was_raised(error)}")
        if not isinstance(loaded, Registration):
            return broken(self.name, f"gives a {type(loaded).__name__}, not a Registration")
        if loaded.name != self.name:
            return broken(self.name, f"registered as {self.name}, but calls itself {loaded.name}")
        return loaded


def sources(plugins: Sequence[EntryPoint] | None = None) -> Mapping[str, Source]:
    """Every backend by name, built-in ones first.

    Args:
        plugins: entry points of others; None: the installed ones of the group ``penstock.backends``.

    Raises:
        DuplicateBackend: two have the same name.
    """
    found = {name: Source(name, "", partial(_built_in, module)) for name, module in BUILT_IN.items()}
    for point in entry_points(group=GROUP) if plugins is None else plugins:
        if point.name in found:
            raise DuplicateBackend(f"two backends are named {point.name}: uninstall the one from {point.value}, or rename it")
        package = f"{point.dist.name} {point.dist.version}" if point.dist is not None else point.value
        found[point.name] = Source(point.name, package, point.load)
    return found


def broken(name: str, reason: str) -> Registration:
    """A backend that does nothing but say why."""
    return Registration(
        name=name,
        probe=partial(Broken, reason),
        capabilities=lambda _: Unsupported(reason),
        create=partial(_refuse, reason),
    )


def _built_in(module: str) -> object:
    return importlib.import_module(module).REGISTRATION


def _refuse(reason: str, _spec: ModelSpec, _config: DeviceConfig) -> GenerativeModel:
    raise NoBackend(reason)
