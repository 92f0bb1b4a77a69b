"""NVIDIA GPUs by TensorRT: the decoder as an ONNX graph, built into an engine for one GPU and kept on disk.

`graph` writes the decoder, `building` lets TensorRT parse and build it for the shapes of `profiles`, and keeps the plan by
`plans`; `runs` cuts a step into runs of the engine, and `execution` binds it to a cache that Penstock owns and runs it on
torch's stream. What is used of TensorRT is in `api`, and of the device in `device`; docs/tensorrt.md says what has been run,
and where.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from penstock.backends import pytorch
from penstock.backends.contract import (
    Availability,
    Available,
    Broken,
    Capabilities,
    DeviceConfig,
    DType,
    GenerativeModel,
    ModelSpec,
    Registration,
    Unavailable,
)

__all__ = ["OLDEST", "REGISTRATION", "judge"]

OLDEST = (11, 0)
"""The first version whose networks are strongly typed without being asked, which the graph relies on."""

_GPUS = Path("/dev")


def _probe() -> Availability:
    missing = next((name for name in ("tensorrt", "torch", "onnx") if find_spec(name) is None), None)
    if missing is not None:
        return Unavailable(f"{missing} is not installed; on a machine with an NVIDIA GPU, install penstock[tensorrt]")
    torch = pytorch.REGISTRATION.probe()
    if not isinstance(torch, Available):
        return torch
    if not torch.devices[0].startswith("cuda") or not any(_GPUS.glob("nvidia[0-9]*")):
        return Unavailable("there is no NVIDIA GPU that PyTorch may use")
    return judge()


def judge() -> Availability:
    """Whether the package that is installed is one that works here: it is imported, which loads its libraries."""
    try:
        installed = version("tensorrt")
        importlib.import_module("tensorrt")
    except PackageNotFoundError:
        return Broken("tensorrt can be found, but has no installed version: reinstall it")
    except Exception as error:  # noqa: BLE001  what its libraries raise where they do not fit the driver is not known; it is told
        return Broken(f"tensorrt can not be imported: {type(error).__name__}: {error}")
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST:
        return Broken(f"tensorrt is {installed}; {'.'.join(map(str, OLDEST))} or newer is needed: install penstock[tensorrt]")
    return Available(("cuda:0",), installed)


def _capabilities(_: ModelSpec) -> Capabilities:
    return Capabilities(
        dtypes=(DType.BF16, DType.F32), export_kv=True, import_kv=True, kv_layouts=("layer,kv,block,token,head,dim",)
    )


def _create(spec: ModelSpec, config: DeviceConfig) -> GenerativeModel:
    import tensorrt
    from penstock.backends.tensorrt.device import CudaDevice
    from penstock.backends.tensorrt.model import TensorRtModel

    plans = None if config.weight_cache is None else config.weight_cache / "tensorrt"
    return TensorRtModel(spec, config, tensorrt, CudaDevice(config.device), plans)


REGISTRATION = Registration(name="tensorrt", probe=_probe, capabilities=_capabilities, create=_create)
