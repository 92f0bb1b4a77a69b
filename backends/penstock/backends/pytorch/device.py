"""Which device a model is to run on, and what is set while it computes there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from penstock.common.service import StartError

__all__ = ["current", "find_device", "threads"]


def find_device(name: str | None) -> torch.device:
    """The device of this name; None: the best there is.

    Raises:
        StartError: it is not there, or PyTorch can not use it.
    """
    accelerated = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda:0" if accelerated else "cpu"))
    except RuntimeError as error:
        raise StartError(f"device: {name} is none; cpu and cuda:0 are") from error
    if device.type == "cuda" and not accelerated:
        raise StartError(f"device: PyTorch can not use {name}: {_fault_of_cuda()}; CUDA_VISIBLE_DEVICES=-1 has it run on the CPU")
    if device.type not in {"cpu", "cuda"} or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise StartError(f"device: there is no {name} here; there is {'cuda:0 and cpu' if accelerated else 'cpu'}")
    return device


def _fault_of_cuda() -> str:
    """Why PyTorch says that there is no GPU: of a driver too old, or none that answers, it tells only when asked to begin."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # it has no annotations
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0].rstrip(".")
    return "it finds no GPU"


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads, and leave the process's setting as it was."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def current(device: torch.device) -> AbstractContextManager[object]:
    """Have what is launched go to this device, and not to the first one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
