"""The CPU backend: a decoder built straight from a `DecoderSpec` and its weights as an OpenVINO graph.

Nothing is exported or traced. Attention is the runtime's paged attention over blocks of 32 tokens in host memory that this backend
owns; logits are computed for the rows asked for alone. Weights are in memory once, as the plug-in lays them out: what it reads them
from is mapped from files, whose pages are given back. OpenVINO's own cache of compiled graphs is not used: its files hold the
weights again, and a start that reads one is no shorter than one that compiles.
`penstock.backends.openvino.properties` says how the runtime is set up, and why.
"""

from __future__ import annotations

import sys
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

__all__ = ["REGISTRATION"]

# OpenVINO tells a statistics service of each import, and keeps an id in the user's home, unless its telemetry can not be imported.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # how an import is forbidden


def _probe() -> Availability:
    if find_spec("openvino") is None:
        return Unavailable("the package openvino is not installed: pip install openvino")
    try:
        return Available(("cpu",), version("openvino"))
    except PackageNotFoundError:
        return Broken("openvino can be imported, but has no installed version: reinstall it")


def _capabilities(spec: ModelSpec) -> Capabilities | Unsupported:
    if spec.decoder.rope.dim != spec.decoder.head_dim:
        return Unsupported(f"rotates {spec.decoder.rope.dim} of {spec.decoder.head_dim} dimensions of a head; only all can be")
    return Capabilities(
        dtypes=(DType.BF16, DType.INT8, DType.INT4, DType.F32),
        export_kv=True,
        import_kv=True,
        kv_layouts=("block.head.slot.dim",),
        kv_dtypes=(DType.INT8,),
    )


def _create(spec: ModelSpec, config: DeviceConfig) -> GenerativeModel:
    from penstock.backends.openvino.model import OpenVinoModel

    return OpenVinoModel(spec, config)


REGISTRATION = Registration(name="openvino", probe=_probe, capabilities=_capabilities, create=_create)
