"""What this machine computes with, by the kernel's own account: for telling measurements of one machine from another's."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["machine", "usable_cores"]

_CPU = Path("/proc/cpuinfo")
_NVIDIA = Path("/proc/driver/nvidia/gpus")
_AMD = Path("/sys/class/kfd/kfd/topology/nodes")


def machine() -> str:
    """Models of the processor and of the accelerators, such as ``AMD EPYC (25, 1, 1); NVIDIA H200``."""
    return "; ".join([_processor(), *sorted(set(_accelerators()))])


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    fields = _fields(_CPU)
    name = fields.get("model name") or platform.processor() or platform.machine()
    # Virtual machines hide the name, but not what it stands for.
    numbers = [fields[key] for key in ("cpu family", "model", "stepping") if key in fields]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _accelerators() -> list[str]:
    nvidia = [_fields(path).get("Model", "") for path in _NVIDIA.glob("*/information")]
    amd = []
    for path in _AMD.glob("*/name"):
        try:
            amd.append(path.read_text(encoding="utf-8").strip())
        except OSError:
            continue
    return [name for name in nvidia + amd if name]


def _fields(path: Path) -> dict[str, str]:
    """The `key : value` lines of a file's first section."""
    try:
        first = path.read_text(encoding="utf-8", errors="replace").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
