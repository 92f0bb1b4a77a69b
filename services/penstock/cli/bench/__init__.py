"""`penstock bench`: the same work timed in process and through a running suite."""

from __future__ import annotations

from cyclopts import App

__all__ = ["app"]

app = App(name="bench", help="Measure an engine or a suite.")
app.command("penstock.cli.bench.engine:engine", name="engine", help="Measure the engine alone, in this process.")
app.command("penstock.cli.bench.serve:serve", name="serve", help="Measure a running suite, from outside.")
