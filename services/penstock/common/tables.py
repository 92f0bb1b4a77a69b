"""Tables of state machines: written down as a row for each event, asked by state and event."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from typing import TypeVar

__all__ = ["by_state"]

S = TypeVar("S", bound=enum.Enum)
E = TypeVar("E", bound=enum.Enum)
T = TypeVar("T")


def by_state(states: type[S], rows: Mapping[E, Sequence[T]]) -> dict[tuple[S, E], T]:
    """What every event does in every state. A row has a column for each of the states, in their order.

    Raises:
        ValueError: a row has more columns, or fewer.
    """
    return {(state, event): do for event, row in rows.items() for state, do in zip(states, row, strict=True)}
