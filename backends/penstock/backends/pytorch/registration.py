"""Whether PyTorch is here, on which devices and for what; found out without importing it."""

from __future__ import annotations

import importlib.util
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from penstock.backends.architectures.spec import DecoderSpec
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

__all__ = ["KV_LAYOUT", "REGISTRATION"]

KV_LAYOUT = "layer,kv,block,token,head,dim"


def _probe() -> Availability:
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return Unavailable("PyTorch is not installed; install penstock[torch]")
    try:
        built_for = (Path(found.origin).parent / "version.py").read_text(encoding="utf-8")
        return Available((*_accelerators(built_for), "cpu"), _version(built_for))
    except (OSError, PackageNotFoundError) as error:
        return Broken(f"PyTorch's installation is damaged: {error}")


def _version(built_for: str) -> str:
    """With what it is built for, ``2.13.0+cu130``, which a wheel's metadata may leave out."""
    told = re.search(r"^__version__ *= *['\"]([^'\"]+)", built_for, re.MULTILINE)
    return told[1] if told else version("torch")


def _accelerators(built_for: str) -> tuple[str, ...]:
    """Devices that this build of PyTorch may use: ROCm's are called ``cuda`` there too."""

    def built(toolkit: str) -> bool:
        return re.search(rf"^{toolkit}\b[^=]*= *['\"]", built_for, re.MULTILINE) is not None

    if os.environ.get("CUDA_VISIBLE_DEVICES") in {"", "-1"}:
        return ()
    devices = Path("/dev")
    present = (built("cuda") and any(devices.glob("nvidia[0-9]*"))) or (built("hip") and (devices / "kfd").exists())
    return ("cuda:0",) if present else ()


def _capabilities(spec: ModelSpec) -> Capabilities:
    available = _probe()
    accelerated = isinstance(available, Available) and available.devices[0] != "cpu"
    dtypes: tuple[DType, ...] = (DType.BF16, DType.F32) if accelerated or _fast_bfloat16() else (DType.F32, DType.BF16)
    dtypes += (DType.INT8, DType.INT4) if _fits_int4(spec.decoder) else (DType.INT8,)
    return Capabilities(dtypes=dtypes, export_kv=True, import_kv=True, kv_layouts=(KV_LAYOUT,))


def _fits_int4(decoder: DecoderSpec) -> bool:
    """Whether PyTorch's four-bit kernels take the shapes of all products: inputs in groups of 32, outputs in tiles of 32."""
    heads, kv_heads = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    sizes = (decoder.hidden_size, decoder.intermediate_size, heads, heads + 2 * kv_heads)
    return all(size % 32 == 0 for size in sizes)


def _fast_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself; elsewhere PyTorch is slower with it than with float32."""
    try:
        return re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", Path("/proc/cpuinfo").read_text(encoding="utf-8")) is not None
    except OSError:
        return False


def _create(spec: ModelSpec, config: DeviceConfig) -> GenerativeModel:
    from penstock.backends.pytorch.model import TorchModel

    return TorchModel(spec, config)


REGISTRATION = Registration(name="torch", probe=_probe, capabilities=_capabilities, create=_create)
