"""Whether ONNX Runtime is here, on which devices and for what; found out without importing it into this process."""

from __future__ import annotations

import sys
from collections.abc import Mapping
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
from penstock.backends.onnxruntime.accelerators import Proof, proofs
from penstock.common.service import StartError

__all__ = ["DTYPES", "REGISTRATION", "decide"]

DTYPES = (DType.F32, DType.INT8, DType.INT4)
"""Types of weights on the CPU. The first is taken where none is asked for, so no rounded one, though these are faster."""

# The runtime's distributions, of which each brings the same module.
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-rocm", "onnxruntime-migraphx", "onnxruntime-directml")


def _installed() -> Mapping[str, str]:
    """Versions of the distributions that are here."""
    found = {}
    for distribution in _DISTRIBUTIONS:
        try:
            found[distribution] = version(distribution)
        except PackageNotFoundError:
            continue
    return found


def _proofs() -> Mapping[str, Proof]:
    """What was proven of each device but the CPU. The first distribution has none, but on macOS; nothing is run to learn that."""
    return proofs() if sys.platform == "darwin" or set(_installed()) - {_DISTRIBUTIONS[0]} else {}


def _offered() -> Mapping[str, tuple[DType, ...]]:
    """Types of weights by device, best device first."""
    return {device: proof.dtypes for device, proof in _proofs().items() if proof.dtypes} | {"cpu": DTYPES}


def _probe() -> Availability:
    missing = [module for module in ("onnxruntime", "onnx_ir") if find_spec(module) is None]
    if missing:
        return Unavailable(f"{' and '.join(missing)} not installed; install penstock[onnxruntime]")
    installed = _installed()
    if not installed:
        return Broken("onnxruntime can be imported, but has no installed version: reinstall it")
    unused = {device: proof.fault for device, proof in _proofs().items() if not proof.dtypes}
    return Available(tuple(_offered()), next(iter(installed.values())), unused)


def _capabilities(spec: ModelSpec) -> Capabilities | Unsupported:
    decoder = spec.decoder
    if decoder.rope.dim != decoder.head_dim:
        return Unsupported(f"rotates {decoder.rope.dim} of {decoder.head_dim} dimensions of a head; only all can be")
    device, dtypes = next(iter(_offered().items()))
    untried = (
        {} if device == "cpu" else dict.fromkeys(dtypes, f"was proven to be right on {device}, and its speed was measured nowhere")
    )
    return Capabilities(
        dtypes=dtypes,
        yields=untried,
        prefix_cache=device == "cpu",
        export_kv=True,
        import_kv=True,
        kv_layouts=("lane.head.position.dim",),
    )


def decide(config: DeviceConfig, offered: Mapping[str, tuple[DType, ...]]) -> tuple[str, DType]:
    """Device and type of weights.

    Args:
        config: what is asked.
        offered: types of weights by device, best device first.

    Raises:
        StartError: there is no such device, or it has not that type; or the cache is asked for in a type of its own.
    """
    device = config.device or next(iter(offered))
    if device not in offered:
        raise StartError(f"device: backend onnxruntime decodes on {', '.join(offered)} alone, not on {device}")
    dtype = config.dtype or offered[device][0]
    if dtype not in offered[device]:
        raise StartError(f"backend onnxruntime has no {dtype}, but {', '.join(offered[device])}")
    if config.kv_cache_dtype is not None:
        raise StartError(f"backend onnxruntime has no KV cache of {config.kv_cache_dtype}: leave kv_cache_dtype away")
    return device, dtype


def _create(spec: ModelSpec, config: DeviceConfig) -> GenerativeModel:
    from penstock.backends.onnxruntime.model import OnnxRuntimeModel
    from penstock.backends.onnxruntime.providers import target_of

    device, dtype = decide(config, _offered())
    return OnnxRuntimeModel(spec, config, dtype, target_of(device))


REGISTRATION = Registration(name="onnxruntime", probe=_probe, capabilities=_capabilities, create=_create)
