"""Results as they are printed, and the progress bar beside them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from penstock.cli.bench.measure import Result
from penstock.cli.tables import print_table

__all__ = ["Report", "progress"]

_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "scenario": lambda r: str(r["scenario"]),
    "seconds": lambda r: f"{r['seconds']:.3f}",
    "out tok/s": lambda r: f"{r['out_tok_s']:.1f}",
    "all tok/s": lambda r: f"{r['total_tok_s']:.1f}",
    "TTFT ms": lambda r: _middle(r["ttft_ms"]),
    "p99": lambda r: _tail(r["ttft_ms"]),
    "ITL ms": lambda r: _middle(r["itl_ms"]),
    "p99 ": lambda r: _tail(r["itl_ms"]),
}
_OPEN_LOOP_COLUMNS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "failed": lambda r: f"{r['failed']} of {r['requests']}",
    "good/s": lambda r: f"{r['goodput_req_s']:.2f}",
}


class Report:
    """Prints each result as a line of JSON when it comes, or all of them as a table at the end."""

    def __init__(self, *, as_json: bool, ids: Path | None) -> None:
        self._as_json = as_json
        self._ids_file = ids
        self._results: list[Result] = []

    def add(self, result: Result) -> None:
        self._results.append(result)
        for line in _failures(result.fields):
            print(line, file=sys.stderr)
        if self._as_json:
            print(json.dumps(result.fields), flush=True)

    @property
    def in_vain(self) -> bool:
        """Whether there is a result without any answer."""
        return any(r.fields.get("failed", 0) and r.fields["failed"] == r.fields["requests"] for r in self._results)

    def finish(self) -> None:
        """Print the table, and write the ids where they are wanted."""
        if self._ids_file is not None:
            self._ids_file.write_text(json.dumps({r.fields["scenario"]: r.ids for r in self._results}) + "\n")
        if not self._as_json:
            _print_table([r.fields for r in self._results])


def _print_table(rows: list[dict[str, Any]]) -> None:
    first = rows[0]
    columns = {**_COLUMNS, **(_OPEN_LOOP_COLUMNS if "goodput_req_s" in first else {})}
    print(f"{first['engine']} {first['version']}, {first['backend']}, {first['dtype']}", flush=True)
    print_table(list(columns), ([cell(row) for cell in columns.values()] for row in rows), figures=True)


def _failures(fields: Mapping[str, Any]) -> Iterator[str]:
    """What a person wants to read of requests that failed; nothing where none did."""
    if not fields.get("failed"):
        return
    yield f"penstock: {fields['failed']} of {fields['requests']} requests failed"
    named = 0
    for kind in fields["errors"]:
        named += kind["requests"]
        yield f"penstock: {kind['requests']} of them: {kind['error']}"
    if named < fields["failed"]:
        yield f"penstock: {fields['failed'] - named} of them in other ways"


def _middle(figures: Mapping[str, float] | None) -> str:
    return "" if figures is None else f"{figures['p50']:.1f}"


def _tail(figures: Mapping[str, float] | None) -> str:
    return "" if figures is None else f"{figures['p99']:.1f}"


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal that the yielded function moves on by one request; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    # Redrawn rarely: it shares the cores with what is measured.
    with Progress(console=Console(stderr=True), transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)
