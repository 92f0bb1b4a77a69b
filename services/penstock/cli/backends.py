"""`penstock backends`: what can run models on this machine, or why it can not."""

from __future__ import annotations

import json
from typing import Annotated, Any

from cyclopts import Parameter

from penstock.cli.tables import print_table

__all__ = ["backends"]


def backends(*, as_json: Annotated[bool, Parameter(name="--json", negative=())] = False) -> int:
    """Tell each backend, its version and devices, or why it does not run here.

    "unavailable" is not meant to run here; "broken" is meant to, and failed.

    Args:
        as_json: One JSON list instead of a table.
    """
    from penstock.backends.registry import describe

    rows = [_row(report.name, report.availability) for report in describe()]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        headings = ("backend", "state", "version", "devices, or why not")
        print_table(headings, (_cells(row) for row in rows))
    return 0


def _row(name: str, availability: Any) -> dict[str, Any]:
    from penstock.backends.contract import Available, Broken

    if isinstance(availability, Available):
        return {"name": name, "state": "available", "devices": list(availability.devices), "version": availability.version}
    state = "broken" if isinstance(availability, Broken) else "unavailable"
    return {"name": name, "state": state, "reason": availability.reason}


def _cells(row: dict[str, Any]) -> tuple[str, str, str, str]:
    return row["name"], row["state"], row.get("version", ""), row.get("reason") or ", ".join(row["devices"])
