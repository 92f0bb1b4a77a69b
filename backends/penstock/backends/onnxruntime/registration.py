"""Whether ONNX Runtime is here and for what; found out without importing it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

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
    Unsupported,
)

__all__ = ["DTYPES", "REGISTRATION"]

DTYPES = (DType.F32, DType.INT8, DType.INT4)
"""Types of weights. The first is taken where none is asked for, so no rounded one, though these are faster."""

# The runtime's distributions, of which each brings the same module.
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-rocm", "onnxruntime-migraphx", "onnxruntime-directml")


def _probe() -> Availability:
    missing = [module for module in ("onnxruntime", "onnx_ir") if find_spec(module) is None]
    if missing:
        return Unavailable(f"{' and '.join(missing)} not installed; install penstock[onnxruntime]")
    for distribution in _DISTRIBUTIONS:
        try:
            return Available(("cpu",), version(distribution))
        except PackageNotFoundError:
            continue
    return Broken("onnxruntime can be imported, but has no installed version: reinstall it")


def _capabilities(spec: ModelSpec) -> Capabilities | Unsupported:
    decoder = spec.decoder
    if decoder.rope.dim != decoder.head_dim:
        return Unsupported(f"rotates {decoder.rope.dim} of {decoder.head_dim} dimensions of a head; only all can be")
    return Capabilities(
        dtypes=DTYPES,
        prefix_cache=False,
        export_kv=True,
        import_kv=True,
        kv_layouts=("lane.head.position.dim",),
    )


def _create(spec: ModelSpec, config: DeviceConfig) -> GenerativeModel:
    from penstock.backends.onnxruntime.model import OnnxRuntimeModel

    return OnnxRuntimeModel(spec, config)


REGISTRATION = Registration(name="onnxruntime", probe=_probe, capabilities=_capabilities, create=_create)
