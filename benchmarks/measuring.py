"""What the benchmarks share: the machine that they ran on, a suite of their own, and the printing of their figures."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from penstock.cli.grpc_threads import with_fewer_threads

__all__ = ["Suite", "machine", "report", "spread", "suite"]

# A benchmark's own process talks gRPC as the `penstock` commands do. gRPC reads it when it is first imported: where speed counts,
# this module comes before it.
os.environ.update(with_fewer_threads(os.environ))

_PACKAGES = ("penstock", "openvino", "grpcio", "protobuf", "numpy", "torch")


@dataclass(frozen=True)
class Suite:
    """Where a running suite listens, and the process that supervises it."""

    grpc: str
    http: str
    pid: int


@contextlib.contextmanager
def suite(model: str, *options: str) -> Iterator[Suite]:
    """Run ``penstock up MODEL`` on free ports while the body runs. Its logs go to stderr.

    Raises:
        RuntimeError: it ended before it was ready; it has said why.
    """
    command = [sys.executable, "-m", "penstock.cli", "up", model, "--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None  # noqa: S101 - a pipe was asked for
            line = process.stdout.readline().split()
            if line[:1] != ["ready"]:
                raise RuntimeError(f"{' '.join(command)} did not start")
            yield Suite(**dict(part.split("=", 1) for part in line[1:]), pid=process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def machine() -> dict[str, Any]:
    """The machine and the versions of what ran on it."""
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **versions,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def report(name: str, figures: Mapping[str, Any]) -> None:
    """Print a benchmark's result as one JSON object."""
    print(json.dumps({"benchmark": name, **figures, "machine": machine()}, indent=2), flush=True)


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
