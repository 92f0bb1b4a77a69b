"""What a backend says of itself, checked before anything is made of it: types, known names, sizes."""

# What a backend says is of no type until it was looked at, whatever the annotations promise.
# mypy: disable-error-code="redundant-expr"

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from penstock.backends.contract import (
    CANONICAL_DTYPES,
    Available,
    Broken,
    Capabilities,
    DType,
    GenerativeModel,
    KvSpec,
    Task,
    Tuned,
    Unavailable,
    Unsupported,
)
from penstock.backends.kv_abilities import native_kv, prefix_copies

__all__ = ["fault_of_availability", "fault_of_capabilities", "fault_of_kv", "fault_of_model"]

_MOST = 1 << 62
_MOST_BLOCKS = 1 << 31  # a batch names them as int32


def fault_of_availability(availability: object) -> str | None:
    """What is wrong with the answer of a probe; None: nothing."""
    if isinstance(availability, Unavailable | Broken):
        return (
            None
            if isinstance(availability.reason, str) and availability.reason
            else f"reason: must say why, and is {availability.reason!r}"
        )
    if not isinstance(availability, Available):
        return f"gives a {type(availability).__name__}, not an Available, Unavailable or Broken"
    if not _are(availability.devices, str) or not availability.devices or not all(availability.devices):
        return f"devices: must be a tuple of names, best first, and is {availability.devices!r}"
    if not _names_names(availability.unused):
        return f"unused: must be reasons by devices, and is {availability.unused!r}"
    return None if isinstance(availability.version, str) else f"version: must be text, and is {availability.version!r}"


def fault_of_capabilities(capabilities: object) -> str | None:
    """What is wrong with what a backend says that it can do; None: nothing."""
    if isinstance(capabilities, Unsupported):
        return (
            None
            if isinstance(capabilities.reason, str) and capabilities.reason
            else f"reason: must say why, and is {capabilities.reason!r}"
        )
    if not isinstance(capabilities, Capabilities):
        return f"gives a {type(capabilities).__name__}, not Capabilities or Unsupported"
    return next(_faults(capabilities), None)


def _faults(capabilities: Capabilities) -> Iterator[str]:
    for name, kind in (("dtypes", DType), ("tasks", Task), ("kv_dtypes", DType)):
        value = getattr(capabilities, name)
        if not _are(value, kind) or (not value and name != "kv_dtypes"):
            yield f"{name}: must be a tuple of {kind.__name__} ({', '.join(kind)}), and is {value!r}"
    if not _are(capabilities.kv_layouts, str):
        yield f"kv_layouts: must be a tuple of names, and is {capabilities.kv_layouts!r}"
    for field in fields(Capabilities):
        value = getattr(capabilities, field.name)
        if field.type == "bool" and not isinstance(value, bool):
            yield f"{field.name}: must be True or False, and is {value!r}"
        if field.type == "int | None" and value is not None and not _is_size(value):
            yield f"{field.name}: must be a whole number from 1, or None, and is {value!r}"
    weights = capabilities.weight_bytes
    if not isinstance(weights, Mapping) or not all(isinstance(d, DType) and _is_size(n) for d, n in weights.items()):
        yield f"weight_bytes: must be whole numbers from 1 by DType, and is {weights!r}"
    yields = capabilities.yields
    if not isinstance(yields, Mapping) or not all(
        isinstance(d, DType) and isinstance(why, str) and why for d, why in yields.items()
    ):
        yield f"yields: must be reasons by DType, and is {yields!r}"


def fault_of_model(model: GenerativeModel, capabilities: Capabilities) -> str | None:
    """What is wrong with a model that a backend has made, measured by what it said that it can do; None: nothing."""
    fault = fault_of_kv(model.kv) or _missing(model)
    if fault is not None:
        return fault
    if isinstance(model, Tuned) and not _names_names(model.ways):
        return f"ways: must be names by what they are for, and is {model.ways!r}"
    if capabilities.kv_layouts and model.kv.layout not in capabilities.kv_layouts:
        return f"kv.layout: is {model.kv.layout!r}, and not one of {', '.join(capabilities.kv_layouts)}"
    if model.dtype not in capabilities.dtypes:
        return f"dtype: is {model.dtype!r}, and not one of {', '.join(capabilities.dtypes)}"
    return None if isinstance(model.device, str) and model.device else f"device: must be a name, and is {model.device!r}"


def _missing(model: GenerativeModel) -> str | None:
    """What its cache says that the model has, and it has not."""
    try:
        native_kv(model)
        prefix_copies(model)
    except TypeError as error:
        return str(error)
    return None


def fault_of_kv(kv: object) -> str | None:
    """What is wrong with what a model says of its cache; None: nothing."""
    return next(_faults_of_kv(kv), None) if isinstance(kv, KvSpec) else f"kv: must be a KvSpec, and is a {type(kv).__name__}"


def _faults_of_kv(kv: KvSpec) -> Iterator[str]:
    for name in ("block_size", "blocks", "bytes_per_block"):
        if not _is_size(getattr(kv, name)):
            yield f"kv.{name}: must be a whole number from 1, and is {getattr(kv, name)!r}"
    if kv.blocks > _MOST_BLOCKS:
        yield f"kv.blocks: must be at most {_MOST_BLOCKS}, since a batch names blocks as int32, and is {kv.blocks}"
    for name in ("layout", "dtype", "native_layout"):
        if not isinstance(getattr(kv, name), str):
            yield f"kv.{name}: must be text, and is {getattr(kv, name)!r}"
    if not isinstance(kv.token_shape, tuple) or len(kv.token_shape) != 3 or not all(map(_is_size, kv.token_shape)):
        yield f"kv.token_shape: must be the numbers of layers, kv heads and head dim, and is {kv.token_shape!r}"
    if kv.canonical_dtype not in CANONICAL_DTYPES:
        yield f"kv.canonical_dtype: must be one of {', '.join(CANONICAL_DTYPES)}, and is {kv.canonical_dtype!r}"
    if not isinstance(kv.copies_prefixes, bool):
        yield f"kv.copies_prefixes: must be True or False, and is {kv.copies_prefixes!r}"


def _are(value: object, kind: type) -> bool:
    return isinstance(value, tuple) and all(isinstance(one, kind) for one in value)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST


def _names_names(names: object) -> bool:
    return isinstance(names, Mapping) and _are((*names, *names.values()), str)
