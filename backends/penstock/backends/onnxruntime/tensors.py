"""Any ONNX model as a `TensorModel`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import onnxruntime as ort
from penstock.backends.contract import InvalidTensor, TensorModel, TensorSpec
from penstock.backends.onnxruntime.providers import choose
from penstock.backends.onnxruntime.session import options
from penstock.common.service import StartError

__all__ = ["open_tensor_model"]

_TYPES: Mapping[str, str] = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    **{f"tensor({name})": name for name in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
}


def open_tensor_model(path: Path, device: str | None = None, threads: int | None = None) -> TensorModel:
    """Load a model from a file of ONNX's format.

    Args:
        path: the file; tensors that it keeps outside of itself must lie in its folder.
        device: where it runs (``cpu``, ``cuda:0``); None: the best that the runtime knows.
        threads: of computation; None: every core of the process's affinity.

    Raises:
        StartError: there is no such file or device, the runtime can not load it, or it has inputs or outputs that numpy has no
            type for.
    """
    return _OnnxModel(path, device, threads or len(os.sched_getaffinity(0)))


class _OnnxModel:
    def __init__(self, path: Path, device: str | None, threads: int) -> None:
        self._device, providers = choose(device, ort.get_available_providers())
        if not path.is_file():
            raise StartError(f"{path}: no such file; name one of ONNX's format")
        _, _, number = self._device.partition(":")
        first = (providers[0], {"device_id": number}) if number else providers[0]
        try:
            session = ort.InferenceSession(path, options(threads), providers=[first, *providers[1:]])
        except Exception as error:  # the runtime raises a dozen types of its own, which share no other base
            raise StartError(f"{path}: onnxruntime can not load it: {_first_line(error)}") from error
        self._session: ort.InferenceSession | None = session
        self._inputs = {node.name: _spec(path, node) for node in session.get_inputs()}
        self._outputs = {node.name: _spec(path, node) for node in session.get_outputs()}

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """What it takes."""
        return self._inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """What it gives."""
        return self._outputs

    @property
    def device(self) -> str:
        """Where it runs."""
        return self._device

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Compute every output.

        Raises:
            InvalidTensor: an input is missing, unknown, or of another type or shape.
            RuntimeError: the model is closed, or the runtime failed.
        """
        session = self._session
        if session is None:
            raise RuntimeError("the model is closed")
        _check(self._inputs, inputs)
        try:
            found: Sequence[NDArray[Any]] = session.run(list(self._outputs), dict(inputs))
        except Exception as error:  # as above
            raise RuntimeError(f"onnxruntime failed: {_first_line(error)}") from error
        return dict(zip(self._outputs, found, strict=True))

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        self._session = None


def _check(specs: Mapping[str, TensorSpec], inputs: Mapping[str, NDArray[Any]]) -> None:
    known = ", ".join(specs)
    for name in inputs:
        if name not in specs:
            raise InvalidTensor(f"{name}: the model has no such input; it has {known}")
    sizes: dict[str, tuple[int, str]] = {}
    for name, spec in specs.items():
        if name not in inputs:
            raise InvalidTensor(f"{name}: missing; the model takes {known}")
        array = inputs[name]
        if array.dtype != np.dtype(spec.dtype):
            raise InvalidTensor(f"{name}: must be {spec.dtype}, not {array.dtype}")
        if len(array.shape) != len(spec.shape) or any(
            isinstance(size, int) and size != given for size, given in zip(spec.shape, array.shape, strict=True)
        ):
            raise InvalidTensor(f"{name}: must have shape {_shown(spec.shape)}, not {_shown(array.shape)}")
        for size, given in zip(spec.shape, array.shape, strict=True):
            other, where = sizes.setdefault(size, (given, name)) if isinstance(size, str) else (given, name)
            if other != given:
                raise InvalidTensor(f"{name}: {size} is {given} here and {other} in {where}; it must be the same")


def _spec(path: Path, node: Any) -> TensorSpec:
    dtype = _TYPES.get(node.type)
    if dtype is None:
        raise StartError(f"{path}: {node.name} is a {node.type}; inputs and outputs must be tensors of numbers")
    unnamed = (f"{node.name}.{axis}" for axis in range(len(node.shape)))
    return TensorSpec(dtype, tuple(name if size is None else size for name, size in zip(unnamed, node.shape, strict=True)))


def _shown(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
