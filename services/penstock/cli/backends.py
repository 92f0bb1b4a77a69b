"""`penstock backends`: what can run models on this machine and which one would, or why it can not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from penstock.cli.tables import print_table
from penstock.common.config import ConfigError

if TYPE_CHECKING:  # numpy comes with them, and help is to be quick
    from penstock.backends.contract import ModelSpec
    from penstock.backends.inspection import BackendReport
    from penstock.backends.ranking import Standing

__all__ = ["backends", "read_spec"]


def backends(
    *,
    model: str | None = None,
    dtype: Literal["auto", "f32", "bf16", "int8", "int4"] = "auto",
    kv_cache_dtype: Literal["auto", "int8"] = "auto",
    threads: int | None = None,
    cache_folder: str | None = None,
    probe_seconds: float = 20.0,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
) -> int:
    """Tell each backend, its version and devices, or why it does not run here; with a model, what it can do and which one is taken.

    "unavailable" is not meant to run here; "broken" is meant to, and failed.

    Args:
        model: Folder of a checkpoint, builtin, or a Hugging Face id.
        dtype: As the executor's; auto leaves it to each backend.
        kv_cache_dtype: As the executor's; auto is each backend's own choice.
        threads: Of computation, whose measured speeds are compared; every core of the process where absent.
        cache_folder: The executor's cache folder, with the measured speeds; $XDG_CACHE_HOME/penstock or ~/.cache/penstock where
            absent.
        probe_seconds: Seconds that a backend has to say what it is.
        as_json: One JSON list instead of a table.
    """
    from penstock.backends.contract import DType
    from penstock.backends.registry import describe, standings
    from penstock.backends.speed import kept_speeds
    from penstock.common import logs
    from penstock.common.cache import found_cache

    _check("--threads", threads, 1)
    _check("--probe-seconds", probe_seconds, 0.1)
    logs.configure("backends", "warning")
    if model is None:
        rows = [_row(report) for report in describe(seconds=probe_seconds)]
    else:
        cache = found_cache(cache_folder)
        spec = read_spec(model, cache)
        asked = [None if name == "auto" else DType(name) for name in (dtype, kv_cache_dtype)]
        speeds = kept_speeds(cache, spec.fingerprint, threads)
        judged = standings(spec, *asked, speeds=speeds, seconds=probe_seconds)
        rows = [_row(standing.report) | _judged(standing, spec) for standing in judged]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif model is None:
        print_table(("backend", "from", "state", "version", "devices, or why not"), map(_cells, rows))
    else:
        headings = ("backend", "from", "version", "devices", "dtypes", "features", "KV layouts", "verdict", "why")
        print_table(headings, map(_judged_cells, rows))
    return 0


def _check(option: str, value: float | None, least: float) -> None:
    if value is not None and not least <= value < math.inf:  # nan is neither
        raise ConfigError(f"{option}: must be a number of at least {least}, and is {value}")


def read_spec(model: str, cache: Path | None) -> ModelSpec:
    """What a checkpoint is, by its headers; `cache` is where digests of its files are kept.

    Raises:
        StartError: there is none, or it can not be read.
    """
    from penstock.backends.checkpoint import CheckpointError, read_model
    from penstock.common.service import StartError
    from penstock.common.sources import default_name, resolve

    folder = resolve(model)
    try:
        return read_model(folder, default_name(model), cache=cache)
    except CheckpointError as error:
        raise StartError(str(error)) from error


def _row(report: BackendReport) -> dict[str, Any]:
    from penstock.backends.reports import write_answer

    availability = write_answer(report.availability, None)["availability"]
    return {"name": report.name, "package": report.package or None, **availability}


def _judged(standing: Standing, spec: ModelSpec) -> dict[str, Any]:
    """What is told of a backend for one model."""
    from dataclasses import asdict

    row: dict[str, Any] = {"verdict": standing.verdict.value, "why": standing.reason, "dtype": standing.dtype}
    row["speed"] = None if standing.speed is None else asdict(standing.speed)
    return row | {"supports": _supports(standing.report, spec)}


def _supports(report: BackendReport, spec: ModelSpec) -> dict[str, Any] | None:
    from penstock.backends.contract import Capabilities

    can = report.capabilities
    if not isinstance(can, Capabilities):
        return None
    return {
        "family": spec.decoder.architecture,
        "tasks": can.tasks,
        "dtypes": can.dtypes,
        "quantisation": [dtype for dtype in can.dtypes if dtype.quantised],
        "features": can.features,
        "kv_layouts": can.kv_layouts,
        "kv_dtypes": can.kv_dtypes,
        "max_context": can.max_context or spec.decoder.context_length,
        "max_batch_size": can.max_batch_size,
    }


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    where = _devices(row) + _unused(row) or row["reason"]
    return (row["name"], row["package"] or "built in", row["state"], row.get("version", ""), where)


def _judged_cells(row: dict[str, Any]) -> tuple[str, ...]:
    can = row["supports"] or {"dtypes": (), "features": (), "kv_layouts": ()}
    lists = (" ".join(can[key]) for key in ("dtypes", "features", "kv_layouts"))
    why = row["why"] + _unused(row)
    return (row["name"], row["package"] or "built in", row.get("version", ""), _devices(row), *lists, row["verdict"], why)


def _devices(row: dict[str, Any]) -> str:
    return ", ".join(row.get("devices", ()))


def _unused(row: dict[str, Any]) -> str:
    return "".join(f"; not on {device}: {reason}" for device, reason in row.get("unused", {}).items())
