"""`penstock models`: what is served, and by whom."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

from cyclopts import Parameter

from penstock.cli.connection import Connection, connected
from penstock.cli.tables import print_table
from penstock.client import Calibration, Model, ModelExecutor

__all__ = ["models"]


def models(
    *,
    executors: Annotated[bool, Parameter(negative=())] = False,
    connection: Annotated[Connection, Parameter(name="*")] = Connection(),
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """List the models that are served.

    Args:
        executors: Each model's executors too, with their load.
        connection: See its fields.
        as_json: One JSON list instead of a table.
    """
    with connected(connection) as client:
        listed = client.models()
    if as_json:
        plain = [asdict(model) for model in listed]
        shown = plain if executors else [{k: v for k, v in model.items() if k != "executors"} for model in plain]
        print(json.dumps(shown, indent=2, default=str))
    else:
        _print_tables(listed, executors=executors)
    return 0


def _print_tables(listed: Sequence[Model], *, executors: bool) -> None:
    headings = ("model", "architecture", "context", "vocabulary", "executors")
    print_table(headings, ((m.name, m.architecture, m.context_length, m.vocabulary_size, len(m.executors)) for m in listed))
    if executors:
        print()
        columns = (
            "model",
            "executor",
            "backend",
            "version",
            "device",
            "dtype",
            "role",
            "running",
            "waiting",
            "KV blocks free",
            "state",
            "prefill tokens/s",
            "decode tokens/s by batch",
            "features",
        )
        print_table(columns, ((model.name, *_cells(executor)) for model in listed for executor in model.executors))


def _cells(executor: ModelExecutor) -> tuple[object, ...]:
    e = executor
    free = f"{e.kv_blocks_free}/{e.kv_blocks}"
    state = "draining" if e.draining else "serving"
    features = " ".join(e.features)
    what = (e.executor_id, e.backend, e.backend_version, e.device, e.dtype, e.role)
    return (*what, e.running, e.waiting, free, state, *_speeds(e.calibration), features)


def _speeds(calibration: Calibration | None) -> tuple[str, str]:
    """Calibrated speeds of prefill, and of decoding at one sequence and at the most that were measured."""
    if calibration is None:
        return "", ""
    decode = calibration.decode_tokens_per_second
    batches = sorted({min(decode), max(decode)}) if decode else []
    return f"{calibration.prefill_tokens_per_second:,.0f}", " ".join(f"{batch}:{decode[batch]:,.1f}" for batch in batches)
