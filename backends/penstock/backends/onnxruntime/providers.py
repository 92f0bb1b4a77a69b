"""Execution providers: which devices the installed runtime can use, under the names that operators give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.common.service import StartError

__all__ = ["PROVIDERS", "choose", "devices"]

PROVIDERS: Mapping[str, str] = {
    "cuda": "CUDAExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "directml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "cpu": "CPUExecutionProvider",
}
"""The runtime's name for each kind of device, those first that are taken first where the operator names none."""


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
