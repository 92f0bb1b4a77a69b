"""`penstock calibrate`: how fast each backend is with a model on this machine, kept where starts find it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from penstock.cli.backends import read_spec
from penstock.cli.interrupts import at_once
from penstock.cli.tables import print_table
from penstock.common import logs
from penstock.common.service import StartError

if TYPE_CHECKING:  # numpy comes with them, and help is to be quick
    from penstock.backends.contract import ModelSpec
    from penstock.backends.ranking import Standing
    from penstock.common.calibrations import Calibrations
    from penstock.executor.config import ExecutorConfig

__all__ = ["Options", "calibrate"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how: settings of the executor that is to be served with.

    Attributes:
        backend: Name of the one to measure; auto measures each that can run the model, on accelerators alone where one of them can.
        dtype: As the executor's; auto leaves it to each backend.
        kv_cache_dtype: As the executor's; auto is each backend's own choice.
        kv_cache_gib: As the executor's; from the memory that is free where absent.
        threads: Of computation, as the executor's; every core of the process where absent.
        cache_folder: The executor's cache folder; $XDG_CACHE_HOME/penstock or ~/.cache/penstock where absent.
        calibration_seconds: Seconds that measuring takes at most, of each; an executor's start takes fewer, and so is less exact.
        probe_seconds: Seconds that a backend has to say what it is.
    """

    backend: str = "auto"
    dtype: Literal["auto", "f32", "bf16", "int8", "int4"] = "auto"
    kv_cache_dtype: Literal["auto", "int8"] = "auto"
    kv_cache_gib: float | None = None
    threads: int | None = None
    cache_folder: str | None = None
    calibration_seconds: float = 20.0
    probe_seconds: float = 20.0


_DEFAULTS = Options()


def calibrate(model: str, *, options: Annotated[Options, Parameter(name="*")] = _DEFAULTS) -> int:
    """Measure how fast backends run a model here, so that `--backend auto` takes the fastest from then on.

    Each is loaded, measured and closed, one after the other. Speeds are kept in the cache folder, in place of those that executors
    have left there. Nothing else should compute meanwhile.

    Args:
        model: Folder of a checkpoint, builtin, or a Hugging Face id.
        options: See its fields.
    """
    from penstock.backends.contract import DType
    from penstock.backends.ranking import rivals
    from penstock.backends.registry import AUTO, standings
    from penstock.backends.speed import kept_speeds
    from penstock.common.cache import found_cache
    from penstock.common.calibrations import Calibrations
    from penstock.executor.config import ExecutorConfig
    from penstock.executor.loading import check

    logs.configure("calibrate", "warning")
    config = ExecutorConfig(model=model, **asdict(options))
    check(config)
    if not options.calibration_seconds:
        raise StartError("calibration_seconds: must be more than 0, for nothing is measured in none")
    folder = found_cache(options.cache_folder)
    if folder is None:
        raise StartError("--cache-folder: must be given where there is no home folder, for speeds are kept there")
    if options.backend != AUTO:
        return _measure(config, Calibrations(folder))
    spec = read_spec(model, folder)
    asked = [None if name == AUTO else DType(name) for name in (options.dtype, options.kv_cache_dtype)]

    def judged() -> list[Standing]:
        speeds = kept_speeds(folder, spec.fingerprint, options.threads)
        return standings(spec, *asked, speeds=speeds, seconds=options.probe_seconds)

    able = rivals(judged())
    failed = [s for s in able if not _measured_apart(model, replace(options, backend=s.report.name))]
    _tell(spec, judged())
    return 1 if failed or not able else 0


def _measure(config: ExecutorConfig, kept: Calibrations) -> int:
    """Measure one in this process, as an executor does at its start."""
    from penstock.backends.speed import speed_of
    from penstock.executor.loading import create, prepare

    with at_once():
        loaded = create(prepare(config), calibrate_anew=True)
    loaded.engine.close()
    if loaded.times is None:
        raise StartError(f"{loaded.backend} could not be measured with {loaded.name}")
    if not any(record.times == loaded.times for record in kept.records()):
        raise StartError(f"--cache-folder: what {loaded.backend} was measured to do could not be kept there")
    print(f"{loaded.backend} {loaded.model.dtype}: {speed_of(loaded.times)}")
    return 0


def _measured_apart(model: str, options: Options) -> bool:
    """Measure one by this command in a process of its own, so that none meets what another left; whether it could be."""
    print(f"measuring {options.backend} …", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "penstock.cli", "calibrate", model]
    for name, value in asdict(options).items():
        if value is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode == 0  # noqa: S603 - this interpreter and this command


def _tell(spec: ModelSpec, judged: Sequence[Standing]) -> None:
    from penstock.backends.ranking import Verdict
    from penstock.backends.speed import BATCH

    rows = []
    for standing in judged:
        name, speed = standing.report.name, standing.speed
        figures = ("",) * 3 if speed is None else [f"{value:,.0f}" for value in (speed.prefill, speed.alone, speed.decode)]
        why = "" if speed is not None and standing.verdict in {Verdict.CHOSEN, Verdict.SLOWER} else standing.reason
        rows.append((name, standing.dtype or "", *figures, standing.verdict, why))
    print(f"{spec.name}, tokens per second:")
    print_table(("backend", "dtype", "prefill", "decode", f"at batch {BATCH}", "verdict", "why"), rows)
