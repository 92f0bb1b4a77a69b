"""Measured step times on disk, so that a start does not measure again what has not changed.

A file for each key, of JSON, in the folder ``calibrations`` of Penstock's cache::

    {"format": 1, "key": {"model": …, "backend": …, …}, "measured_at": 1760000000.0,
     "times": {"prefill": {"sizes": […], "seconds": […]}, "prefill_pair_seconds": …, "decode": …, …}}

Files are written whole and put in place at once, so that processes that start together leave one of their files, never a mixture.
A file that can not be read counts as absent, and a line in the log says why.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penstock.common.logs import logger
from penstock.common.step_times import Curve, StepTimes
from penstock.common.whole_files import write_whole

__all__ = ["Calibrations", "Key", "Record"]

_FORMAT = 1
_LARGEST_FILE = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What step times depend on.

    Attributes:
        model: the checkpoint's fingerprint.
        backend: its name.
        backend_version: its library's.
        penstock: this package's version: its graphs and kernels.
        dtype: of the weights.
        kv: layout and type of the cache.
        device: as the backend names it.
        threads: of computation.
        machine: the processor's and the accelerators' models.
    """

    model: str
    backend: str
    backend_version: str
    penstock: str
    dtype: str
    kv: str
    device: str
    threads: int
    machine: str


@dataclass(frozen=True, slots=True)
class Record:
    """What was measured, and when, in seconds since 1970."""

    key: Key
    times: StepTimes
    measured_at: float


class Calibrations:
    """The records of one folder.

    Args:
        folder: Penstock's cache, as `penstock.common.cache.cache_folder` finds it. It need not be there yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "calibrations"

    def path(self, key: Key) -> Path:
        """Where the record of a key stands."""
        digest = hashlib.blake2b(json.dumps(asdict(key), sort_keys=True).encode(), digest_size=16).hexdigest()
        return self._folder / f"{digest}.json"

    def read(self, key: Key) -> StepTimes | None:
        """What was measured for a key; None where nothing was, or nothing that can be read."""
        record = _read(self.path(key))
        if record is None or record.key != key:
            return None
        return record.times

    def write(self, key: Key, times: StepTimes) -> None:
        """Keep what was measured. A folder that can not be written to costs a warning, and a measurement at the next start."""
        path = self.path(key)
        content = {"format": _FORMAT, "key": asdict(key), "measured_at": time.time(), "times": asdict(times)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(content).encode())
        except OSError as error:
            logger().warning("calibration not kept", file=str(path), error=str(error))

    def records(self) -> Iterator[Record]:
        """All that can be read, the newest first: which backend has run which model here, and how fast."""
        found = [record for path in self._folder.glob("*.json") if (record := _read(path)) is not None]
        yield from sorted(found, key=lambda record: record.measured_at, reverse=True)


def _read(path: Path) -> Record | None:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise ValueError(f"larger than {_LARGEST_FILE} bytes")
        return _record(json.loads(content))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        logger().warning("unreadable calibration ignored", file=str(path), error=f"{type(error).__name__}: {error}")
        return None


def _record(read: Any) -> Record:
    if read["format"] != _FORMAT:
        raise ValueError(f"format {read['format']}, not {_FORMAT}")
    times = read["times"]
    return Record(
        Key(**read["key"]),
        StepTimes(**times | {"prefill": _curve(times["prefill"]), "decode": _curve(times["decode"])}),
        _finite(read["measured_at"]),
    )


def _curve(read: Any) -> Curve:
    return Curve(tuple(map(int, read["sizes"])), tuple(map(_finite, read["seconds"])))


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{value} is no finite number")
    return number
