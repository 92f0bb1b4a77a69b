"""Execution providers: which devices the installed runtime can use, under the names that operators give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.common.service import StartError

__all__ = ["HOST", "PROVIDERS", "Target", "accelerators", "choose", "devices", "target_of"]

PROVIDERS: Mapping[str, str] = {
    "cuda": "CUDAExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""The runtime's name for each kind of device, those first that are taken first where the operator names none."""

# What the runtime calls the memory that a provider computes in. DirectML's has no addresses, by which alone lanes can be bound.
_MEMORY: Mapping[str, str | None] = {
    "cuda": "cuda",
    "migraphx": "gpu",
    "rocm": "gpu",
    "directml": None,
    "coreml": "cpu",
    "cpu": "cpu",
}


@dataclass(frozen=True, slots=True)
class Target:
    """Where a decoder runs.

    Attributes:
        device: as operators name it: ``cpu``, ``cuda:0``.
        provider: the runtime's name of what computes there.
        memory: the runtime's name of the memory that the provider computes in; None: one without addresses.
        allocated: whether lanes lie in memory that the runtime allocates there; else in address space of this process.
        number: which one of several devices.
    """

    device: str
    provider: str
    memory: str | None
    allocated: bool = True
    number: int = 0


HOST = Target("cpu", PROVIDERS["cpu"], _MEMORY["cpu"], allocated=False)
"""The CPU."""


def accelerators(available: Sequence[str]) -> tuple[Target, ...]:
    """The first device of each kind but the CPU that a runtime with these providers names, best first. None of it is proven."""
    return tuple(target_of(f"{kind}:0") for kind in devices(available) if kind != HOST.device)


def target_of(device: str) -> Target:
    """What a device of `HOST` or `accelerators` is to the runtime."""
    kind, _, number = device.partition(":")
    return HOST if device == HOST.device else Target(device, PROVIDERS[kind], _MEMORY[kind], number=int(number))


def devices(available: Sequence[str]) -> tuple[str, ...]:
    """Kinds of devices that a runtime with these providers can use, best first."""
    return tuple(kind for kind, provider in PROVIDERS.items() if provider in available)


def choose(device: str | None, available: Sequence[str]) -> tuple[str, list[str]]:
    """The device to run on, and the providers to run with: what its own can not compute, the CPU does.

    Args:
        device: a kind of device, with or without a number (``cuda:0``); None: the best there is.
        available: the runtime's providers.

    Raises:
        StartError: the runtime has no provider for it.
    """
    here = devices(available)
    kind, _, number = (device or here[0]).partition(":")
    if kind not in here or (number and not number.isdecimal()):
        raise StartError(f"device: {device} is not here; onnxruntime has {', '.join(here)}")
    chosen = [PROVIDERS[kind]] if kind == "cpu" else [PROVIDERS[kind], PROVIDERS["cpu"]]
    return device or kind, chosen
