"""What goes between an executor and the process of a backend: frames of a JSON head and the raw bytes of arrays.

A frame is the length of its head (4 bytes, little-endian), the head, and the arrays end to end in the order in which the head tells
their types and shapes. Nothing in it can be executed.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import DeviceConfig, DType, ModelLost
from penstock.common.service import StartError

__all__ = ["RAISED", "Arrays", "Ended", "read_device_config", "receive", "send", "write_device_config"]

Arrays = Mapping[str, NDArray[Any]]

_LENGTH = struct.Struct("<I")
_JOINED = 1 << 18  # bytes of arrays that are sent in one call; copying more costs more than the calls
_LARGEST_HEAD = 1 << 20
_LARGEST_ARRAYS = 1 << 34
_TYPES = {np.dtype(t).name: np.dtype(t) for t in ("int64", "int32", "float32", "float16", "uint8", "int8", ml_dtypes.bfloat16)}

RAISED: Mapping[str, type[Exception]] = {kind.__name__: kind for kind in (ModelLost, StartError, ValueError)}
"""Exceptions that mean something in the contract, and so arrive as they were raised; any other is a `RuntimeError`."""

# Types of fields that JSON does not have.
_KINDS: Mapping[str, Callable[[str], Any]] = {"DType | None": DType, "Path | None": Path}


class Ended(ConnectionError):
    """The other side is gone."""


def send(connection: socket.socket, kind: str, facts: Mapping[str, Any], arrays: Arrays | None = None) -> None:
    """Write a frame.

    Raises:
        Ended: nobody reads.
        TypeError, ValueError: JSON can not tell it, or an array is of a type that does not travel; nothing was written.
    """
    raw = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    values = [array.reshape(-1).view(np.uint8).data for array in raw.values()]
    shapes = {name: [array.dtype.name, list(array.shape)] for name, array in raw.items()}
    for name, (dtype, shape) in shapes.items():
        if dtype not in _TYPES:
            raise ValueError(f"{name}: an array of {dtype} {shape}; one of {', '.join(_TYPES)} was due")
    head = json.dumps({"kind": kind, "facts": facts, "arrays": shapes}).encode()
    try:
        if sum(map(len, values)) <= _JOINED:
            connection.sendall(b"".join((_LENGTH.pack(len(head)), head, *values)))
            return
        connection.sendall(_LENGTH.pack(len(head)) + head)
        for value in values:
            connection.sendall(value)
    except OSError as error:
        raise Ended(str(error)) from error


def receive(connection: socket.socket) -> tuple[str, Any, Arrays]:
    """Read a frame: its kind, what it tells and its arrays.

    Raises:
        Ended: nothing comes any more.
        ValueError: it is no frame.
    """
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    if length > _LARGEST_HEAD:
        raise ValueError(f"a head of {length} bytes")
    head = json.loads(_read(connection, length))
    if head.keys() != {"kind", "facts", "arrays"}:
        raise ValueError("no frame")
    return head["kind"], head["facts"], {name: _array(connection, *shape) for name, shape in head["arrays"].items()}


def write_device_config(config: DeviceConfig) -> dict[str, Any]:
    """As JSON can tell it."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}


def read_device_config(written: Mapping[str, Any]) -> DeviceConfig:
    """The inverse of `write_device_config`.

    Raises:
        TypeError, ValueError: it is none.
    """
    kinds = {field.name: _KINDS[str(field.type)] for field in fields(DeviceConfig) if str(field.type) in _KINDS}
    return DeviceConfig(**{**written, **{name: kind(written[name]) for name, kind in kinds.items() if written[name] is not None}})


def _array(connection: socket.socket, name: str, shape: list[Any]) -> NDArray[Any]:
    dtype = _TYPES.get(name)
    if dtype is None or not all(isinstance(n, int) and n >= 0 for n in shape) or math.prod(shape) * 8 > _LARGEST_ARRAYS:
        raise ValueError(f"an array of {name} {shape}")
    return np.frombuffer(_read(connection, math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def _read(connection: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view, got = memoryview(buffer), 0
    while got < size:
        try:
            count = connection.recv_into(view[got:])
        except OSError as error:
            raise Ended(str(error)) from error
        if not count:
            raise Ended("closed")
        got += count
    return buffer
