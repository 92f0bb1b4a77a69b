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

__all__ = ["one_line", "read_answer", "text_of", "what_was_raised", "write_answer"]

_LONGEST_REASON = 1000

_TUPLES = {"dtypes": DType, "tasks": Task, "kv_layouts": str, "kv_dtypes": DType}
_BY_DTYPE = ("weight_bytes", "yields")


def write_answer(availability: Availability, capabilities: Capabilities | Unsupported | None) -> dict[str, Any]:
    """One object; `read_answer` is its inverse."""
    return {"availability": _availability(availability), "capabilities": _capabilities(capabilities)}


def read_answer(written: Mapping[str, Any]) -> tuple[Availability, Capabilities | Unsupported | None]:
    """What another process wrote.

    Raises:
        ValueError, TypeError, KeyError: it is none.
    """
    availability = _read_availability(written["availability"])
    capabilities = _read_capabilities(written["capabilities"])
    fault = fault_of_availability(availability) or (capabilities is not None and fault_of_capabilities(capabilities))
    if fault:
        raise ValueError(fault)
    return availability, capabilities


def one_line(reason: str) -> str:
    """A reason as a table, a log line and a message can have it: drivers tell pages, and names of files that are no text."""
    line = " ".join(reason.encode(errors="replace").decode().split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]} …"


def text_of(error: BaseException) -> str:
    """What an exception says, in one line."""
    return one_line(_said_by(error))


def what_was_raised(error: BaseException) -> str:
    """An exception's type and text, in one line."""
    return one_line(f"{type(error).__name__}: {_said_by(error)}").removesuffix(":")


def _said_by(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as another:  # noqa: BLE001  whose author wrote the exception wrote this too
        return f"its text raises {type(another).__name__}"


def _availability(availability: Availability) -> dict[str, Any]:
    if isinstance(availability, Available):
        return {
            "state": "available",
            "devices": list(availability.devices),
            "version": availability.version,
            "unused": dict(availability.unused),
        }
    return {"state": "broken" if isinstance(availability, Broken) else "unavailable", "reason": one_line(availability.reason)}


def _read_availability(written: Mapping[str, Any]) -> Availability:
    if written["state"] == "available":
        return Available(tuple(written["devices"]), written["version"], written["unused"])
    return (Broken if written["state"] == "broken" else Unavailable)(written["reason"])


def _capabilities(capabilities: Capabilities | Unsupported | None) -> dict[str, Any] | None:
    if capabilities is None:
        return None
    if isinstance(capabilities, Unsupported):
        return {"unsupported": one_line(capabilities.reason)}
    fields = {name: getattr(capabilities, name) for name in Capabilities.__dataclass_fields__}
    return fields | {name: list(fields[name]) for name in _TUPLES} | {name: dict(fields[name]) for name in _BY_DTYPE}


def _read_capabilities(written: Mapping[str, Any] | None) -> Capabilities | Unsupported | None:
    if written is None:
        return None
    if "unsupported" in written:
        return Unsupported(written["unsupported"])
    tuples = {name: tuple(kind(one) for one in written[name]) for name, kind in _TUPLES.items()}
    mappings = {name: {DType(dtype): value for dtype, value in written[name].items()} for name in _BY_DTYPE}
    return Capabilities(**{**written, **tuples, **mappings})
