"""What a service's settings are checked for before it starts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Any

from penstock.common.addresses import host_and_port
from penstock.common.service import StartError

__all__ = ["check_numbers", "check_peer"]


def check_numbers(settings: Any, *, may_be_zero: Collection[str]) -> None:
    """Refuse numbers that no service can work with: each has to be finite, and above 0.

    Args:
        settings: a dataclass; its fields that hold no number are not looked at.
        may_be_zero: fields that 0 has a meaning for.

    Raises:
        StartError: names the setting and what would be right.
    """
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not 0 <= value < math.inf or (value == 0 and field.name not in may_be_zero):
            least = "0 or more" if field.name in may_be_zero else "more than 0"
            raise StartError(f"{field.name} is {value}: it must be a finite number, {least}")


def check_peer(setting: str, address: str) -> None:
    """Refuse an address at which no other service can ever be.

    Args:
        setting: its name.
        address: HOST:PORT, as it should be.

    Raises:
        StartError: it is none, or has port 0.
    """
    try:
        _, port = host_and_port(address)
    except ValueError as error:
        raise StartError(f"{setting}: {error}") from error
    if not port:
        raise StartError(f"{setting}: nothing can be reached at {address}: give the port that the service listens on")
