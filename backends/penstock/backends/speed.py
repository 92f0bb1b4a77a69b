"""How fast backends have been with a model on this machine, from the step times that executors have left on disk."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from penstock.backends.contract import Available, DType
from penstock.backends.inspection import BackendReport
from penstock.backends.ranking import Speed, Speeds, no_speeds
from penstock.common.calibrations import Calibrations, Key
from penstock.common.machine import machine, usable_cores
from penstock.common.step_times import StepTimes

__all__ = ["BATCH", "kept_speeds", "speed_of"]

BATCH = 8
"""Requests at a time, in the work by which speeds are compared."""

# Each of them: so many prompt tokens, and answered by so many.
_PROMPT, _ANSWER = 512, 128


def kept_speeds(cache: Path | None, fingerprint: str, threads: int | None = None) -> Speeds:
    """What was measured of a model with this version of Penstock, on this machine and on as many threads.

    Args:
        cache: Penstock's cache folder; None: nothing is kept.
        fingerprint: of the model.
        threads: of computation; None: every core of the process's affinity.
    """
    if cache is None:
        return no_speeds
    here, count, own = machine(), threads or usable_cores(), version("penstock")
    times: dict[tuple[str, str, str, str], StepTimes] = {}
    for record in Calibrations(cache).records():  # the newest first
        key = record.key
        if (key.model, key.machine, key.threads, key.penstock) == (fingerprint, here, count, own):
            times.setdefault(_ran(key), record.times)

    def speeds(report: BackendReport, dtype: DType) -> Speed | None:
        availability = report.availability
        if not isinstance(availability, Available):
            return None
        found = times.get((report.name, availability.version, availability.devices[0], dtype.value))
        return None if found is None else speed_of(found)

    return speeds


def speed_of(times: StepTimes) -> Speed:
    """What step times amount to in the work by which speeds are compared."""
    step, alone = (times.step_seconds(batch, _PROMPT + _ANSWER / 2) for batch in (BATCH, 1))
    prompt = times.prefill_seconds(_PROMPT)
    return Speed(
        prefill=_PROMPT / prompt,
        decode=BATCH / step,
        alone=1 / alone,
        batch=BATCH,
        seconds=BATCH * prompt + _ANSWER * step,
    )


def _ran(key: Key) -> tuple[str, str, str, str]:
    return key.backend, key.backend_version, key.device, key.dtype
