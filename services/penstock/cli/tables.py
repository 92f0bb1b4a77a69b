"""Plain tables for a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

__all__ = ["print_table"]

_WIDEST = 10_000


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]], *, figures: bool = False) -> None:
    """Write rows under their headings to stdout, folded to a terminal's width; a pipe gets whole lines.

    Args:
        headings: of the columns.
        rows: their cells.
        figures: whether all columns but the first hold figures, which stand to the right.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", justify="right" if figures and index else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console(width=None if sys.stdout.isatty() else _WIDEST).print(table)
