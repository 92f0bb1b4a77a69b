"""What backends say of themselves, as JSON: between processes, and for who reads ``penstock backends --json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.backends.contract import (
    Availability,
    Available,
    Broken,
    Capabilities,
    DType,
    Task,
    Unavailable,
    Unsupported,
)
from penstock.backends.validation import fault_of_availability, fault_of_capabilities

__all__ = ["read_answer", "write_answer"]

_TUPLES = {"dtypes": DType, "tasks": Task, "kv_layouts": str, "kv_dtypes": DType}
_BY_DTYPE = ("weight_bytes", "yields")


def write_answer(availability: Availability, capabilities: Capabilities | Unsupported | None) -> dict[str, Any]:
    """One object; `read_answer` is its inverse."""
    return {"availability": _availability(availability), "capabilities": _capabilities(capabilities)}


def read_answer(told: Mapping[str, Any]) -> tuple[Availability, Capabilities | Unsupported | None]:
    """What another process wrote.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    availability = _read_availability(told["availability"])
    capabilities = _read_capabilities(told["capabilities"])
    fault = fault_of_availability(availability) or (capabilities is not None and fault_of_capabilities(capabilities))
    if fault:
        raise ValueError(fault)
    return availability, capabilities


def _availability(told: Availability) -> dict[str, Any]:
    if isinstance(told, Available):
        return {"state": "available", "devices": list(told.devices), "version": told.version, "unused": dict(told.unused)}
    return {"state": "broken" if isinstance(told, Broken) else "unavailable", "reason": told.reason}


def _read_availability(told: Mapping[str, Any]) -> Availability:
    if told["state"] == "available":
        return Available(tuple(told["devices"]), told["version"], told["unused"])
    return (Broken if told["state"] == "broken" else Unavailable)(told["reason"])


def _capabilities(told: Capabilities | Unsupported | None) -> dict[str, Any] | None:
    if told is None:
        return None
    if isinstance(told, Unsupported):
        return {"unsupported": told.reason}
    fields = {name: getattr(told, name) for name in Capabilities.__dataclass_fields__}
    return fields | {name: list(fields[name]) for name in _TUPLES} | {name: dict(fields[name]) for name in _BY_DTYPE}


def _read_capabilities(told: Mapping[str, Any] | None) -> Capabilities | Unsupported | None:
    if told is None:
        return None
    if "unsupported" in told:
        return Unsupported(told["unsupported"])
    tuples = {name: tuple(kind(one) for one in told[name]) for name, kind in _TUPLES.items()}
    mappings = {name: {DType(dtype): value for dtype, value in told[name].items()} for name in _BY_DTYPE}
    return Capabilities(**{**told, **tuples, **mappings})
