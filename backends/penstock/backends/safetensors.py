"""Safetensors files: headers checked before a weight is touched, tensors mapped into memory without a copy.

The format: eight bytes of length, that many bytes of JSON (name → dtype, shape, offsets), then the tensors end to end
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import ModelSpec
from penstock.common.service import StartError

__all__ = ["CheckpointError", "TensorEntry", "Weights", "read_header"]

# What floating-point weights come in. Anything else is a quantised checkpoint, which no backend reads.
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Sizes of those that may stand in a file beside them without being a weight.
_OTHER_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}

_LENGTH_BYTES = 8
# The reference implementation's bound.
_LONGEST_HEADER = 100_000_000


class CheckpointError(StartError):
    """A checkpoint can not be served: one line that names the file, what is wrong with it and what would be right."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies: bytes `begin` … `end` of `shard`, in the type that the file names."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a file, by name; their bytes are neither read nor mapped.

    Raises:
        CheckpointError: it can not be read, is not safetensors, or is shorter than its header says.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or not 2 <= length <= _LONGEST_HEADER:
                raise CheckpointError(f"{path}: not a safetensors file: its first bytes are no length of a header")
            if _LENGTH_BYTES + length > size:
                raise CheckpointError(
                    f"{path}: truncated within its header: {size} bytes of {_LENGTH_BYTES + length}; fetch it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: can not be read: {error.strerror}") from error
    try:
        values = json.loads(text, object_pairs_hook=_without_doubles)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header is no JSON object ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is no JSON object")
    values.pop("__metadata__", None)
    start = _LENGTH_BYTES + length
    entries = {name: _entry(path, name, value, start) for name, value in values.items()}
    _check_extent(path, entries, start, size)
    return entries


class Weights(Mapping[str, NDArray[Any]]):
    """The tensors of a checkpoint as read-only views of its files: nothing is read until it is used, and nothing is copied.

    A view stays valid for as long as it is referenced, also after `close`; its file is unmapped when the last one is gone.

    Raises:
        CheckpointError: a file can not be mapped, or has a tensor of a type that is no weight.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._entries: dict[str, TensorEntry] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for shard in spec.shards:
            self._entries |= read_header(shard)
            try:
                with shard.open("rb") as file:
                    self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise CheckpointError(f"{shard}: can not be mapped: {error.strerror}") from error

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The tensor of this name; bfloat16 as `ml_dtypes.bfloat16`."""
        entry = self._entries[name]
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(f"{entry.shard}: {name} is {entry.dtype}; a weight is one of {', '.join(_DTYPES)}")
        flat = np.frombuffer(self._maps[entry.shard], dtype, math.prod(entry.shape), entry.begin)
        return flat.reshape(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def release(self) -> None:
        """Give the pages back that have been read; they are read again where a view is used again."""
        for mapped in self._maps.values():
            mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap the files; those of which views are still in use, when these are gone. Idempotent."""
        maps, self._maps, self._entries = self._maps, {}, {}
        for mapped in maps.values():
            try:
                mapped.close()
            except BufferError:
                continue  # a view holds it, and unmaps it when it goes


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name stands in it twice")
    return values


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
        size = _DTYPES[dtype].itemsize if dtype in _DTYPES else _OTHER_SIZES[dtype]
        right = all(type(n) is int and n >= 0 for n in (*shape, begin, end)) and end - begin == math.prod(shape) * size
        if not right:
            raise ValueError("its extent is not that of its shape")
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: not a safetensors file: its header's entry of {name} is malformed") from error
    return TensorEntry(path, dtype, shape, start + begin, start + end)


def _check_extent(path: Path, entries: Mapping[str, TensorEntry], start: int, size: int) -> None:
    """The tensors must lie end to end, as the format says, and fill the file."""
    expected = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != expected:
            raise CheckpointError(f"{path}: not a safetensors file: {name} does not begin where the tensor before it ends")
        expected = entry.end
    if expected > size:
        raise CheckpointError(f"{path}: truncated: {size} bytes, and its header says {expected}; fetch it again")
    if expected < size:
        raise CheckpointError(f"{path}: {size - expected} bytes stand behind its last tensor; fetch it again")
