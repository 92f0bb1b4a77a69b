"""Where engines run: torch's side of the device, behind a port of its own so that the rest needs no GPU to be exercised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from penstock.common.service import StartError

__all__ = ["CudaDevice", "Device"]


class Device(Protocol):
    """A device with a stream of its own.

    Attributes:
        torch: the device as torch knows it.
        identity: model and compute capability: what a plan is built for.
    """

    torch: torch.device
    identity: str

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Everything inside goes to the device's own stream, whose handle this gives; it is done when the block ends."""
        yield 0

    def free_memory(self) -> int:
        """Bytes that nothing holds."""

    def release(self) -> None:
        """Give back what torch keeps for later."""


class CudaDevice:
    """An NVIDIA GPU. The stream is none of the default ones: with those TensorRT waits for the whole device.

    Raises:
        StartError: there is no such device.
    """

    def __init__(self, name: str | None) -> None:
        self.torch = _find(name)
        properties = torch.cuda.get_device_properties(self.torch)
        self.identity = f"{properties.name} {properties.major}.{properties.minor}"
        self._stream = torch.cuda.Stream(self.torch)  # type: ignore[no-untyped-call]  # torch gives it no types

    @contextmanager
    def stream(self) -> Iterator[int]:
        """Everything inside goes to the device's own stream; it is done when the block ends."""
        with torch.cuda.device(self.torch), torch.cuda.stream(self._stream):
            yield self._stream.cuda_stream
            self._stream.synchronize()

    def free_memory(self) -> int:
        """Bytes that nothing holds."""
        return torch.cuda.mem_get_info(self.torch)[0]

    def release(self) -> None:
        """Give back what torch keeps for later."""
        torch.cuda.empty_cache()


def _find(name: str | None) -> torch.device:
    try:
        device = torch.device(name or "cuda:0")
    except RuntimeError as error:
        raise StartError(f"{name} is no device; cuda:0 is") from error
    if device.type != "cuda" or torch.version.hip is not None:
        raise StartError(f"TensorRT runs on NVIDIA GPUs alone: {name} is none; cuda:0 is")
    if (device.index or 0) >= torch.cuda.device_count():
        raise StartError(f"there is no device {device} here; torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", device.index or 0)
