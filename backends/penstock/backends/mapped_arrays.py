"""Where weights lie that are not taken from the checkpoint as they are: in a file, mapped, so that their pages can be given back.

The plug-in lays its own copy of each weight out at the first step, and looks at ours again only if it ever chooses another layout.
Memory of the process would hold both; pages of a file hold neither longer than `release` allows, and come back when they are read.
A file may also be kept, for the next start of the same model to map instead of computing it again. Kept files that no start has
mapped for a month go when another is kept.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import DeviceConfig, DType, ModelSpec
from penstock.common.logs import logger

__all__ = ["MappedArrays", "Unfitting", "fitting", "scratch_folder", "weight_arrays"]

T = TypeVar("T")

_MAGIC = b"penstock arrays 2"
_SLICE = 1 << 22
_UNUSED_SECONDS = 30 * 24 * 3600  # a kept file without a start in that time is of a model that is served no longer
_LEFT_SECONDS = 24 * 3600  # what a start that was killed has left is nobody's by then
_TAIL = len(_MAGIC) + 8  # behind the index: its length, and what kind of file this is


def scratch_folder() -> Path:
    """Where large files without a name go: ``TMPDIR``, or else /var/tmp, since /tmp is often memory itself."""
    large = Path("/var/tmp")  # noqa: S108  only files without a name are made there
    return large if "TMPDIR" not in os.environ and os.access(large, os.W_OK) else Path(tempfile.gettempdir())


def weight_arrays(backend: str, spec: ModelSpec, config: DeviceConfig, dtype: DType, form: str) -> MappedArrays:
    """Where a backend's joined and rounded weights lie. Rounded ones are worth keeping for the next start, others are not.

    Args:
        backend: whose they are.
        spec: the model.
        config: tells where they may be kept.
        dtype: the type that they are held in.
        form: how the backend rounds and names them. What was kept in another, as by an earlier version, is not looked at.
    """
    if config.weight_cache is None or not dtype.quantised:
        return MappedArrays(scratch_folder())
    folder = config.weight_cache / backend
    return MappedArrays(folder, folder / f"{spec.fingerprint}-{dtype}-{form}.arrays")


class Unfitting(LookupError):
    """A kept file has not the arrays that are asked for, and is gone: it was of another version, whatever its name says."""


def fitting(make: Callable[[], T]) -> T:
    """What `make` gives; where kept arrays do not fit it is made again, with arrays that are computed anew."""
    try:
        return make()
    except Unfitting as error:
        logger().warning("kept weights do not fit and are rounded anew", why=str(error))
        return make()


class MappedArrays:
    """Arrays by name, each in pages of its own.

    Attributes:
        complete: whether the arrays came from a kept file: what `array` gives is filled already, and read-only.
    """

    def __init__(self, folder: Path, kept: Path | None = None) -> None:
        """Map `kept` if it is whole; else begin anew, in a file of `folder` without a name, or in memory where that can not be."""
        self._index: dict[str, tuple[int, int, int]] = {}
        self._maps: list[mmap.mmap] = []
        self._kept, self._file, self._size = kept, -1, 0
        self._name: Path | None = None  # of a file that could not be made without one, while it is not kept
        self.complete = kept is not None and self._open(kept)
        if not self.complete:
            self._index.clear()
            with suppress(OSError):
                self._begin(folder)

    def array(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """The array of this name, to be filled unless `complete`.

        Raises:
            Unfitting: a kept file has none of this name and size.
        """
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if self.complete:
            offset, stored, _ = self._index.get(name, (0, -1, 0))
            if stored != size:
                raise self._unfitting(name)
            mapped = mmap.mmap(self._file, size, access=mmap.ACCESS_READ, offset=offset)
            self._maps.append(mapped)
        else:
            mapped = self._grow(name, size)
        return np.frombuffer(mapped, dtype).reshape(shape)

    def release(self) -> None:
        """Give the pages back that the process has read or written so far; those of a file alone."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def keep(self) -> None:
        """Give the file its name, once everything is filled: whole or not at all, whoever else does the same. Costs a read of it.

        A disk or a folder that does not allow it leaves the arrays as they are.
        """
        if self._kept is None or self.complete:
            return
        for mapped, (name, (offset, size, _)) in zip(self._maps, self._index.items(), strict=True):
            self._index[name] = (offset, size, _checksum(mapped))
        text = json.dumps(self._index).encode()
        with suppress(OSError), tempfile.TemporaryDirectory(dir=self._kept.parent, prefix=".new-") as folder:
            os.pwrite(self._file, text + len(text).to_bytes(8, "little") + _MAGIC, self._size)
            whole = self._name
            if whole is None:
                whole = Path(folder, "arrays")
                os.link(f"/proc/self/fd/{self._file}", whole, src_dir_fd=self._file)  # which makes it follow the link
            whole.replace(self._kept)
            self._name = None
        _remove_unused(self._kept.parent)

    def close(self) -> None:
        """Close the file. The arrays stay for as long as they are referenced."""
        self._maps.clear()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._name is not None:
            self._name.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unfitting(self, name: str) -> Unfitting:
        if self._kept is not None:
            with suppress(OSError):
                self._kept.unlink(missing_ok=True)
        return Unfitting(f"{self._kept} has no {name} of the size that is asked for")

    def _begin(self, folder: Path) -> None:
        """A file that goes with the process, whatever ends it; where the file system has none, one that `close` removes."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._file = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError:
            self._file, name = tempfile.mkstemp(dir=folder, prefix=".new-")
            self._name = Path(name)
            if self._kept is None:
                self._name.unlink()
                self._name = None

    def _grow(self, name: str, size: int) -> mmap.mmap:
        offset = self._size
        try:
            os.posix_fallocate(self._file, offset, size)  # a disk that fills up later would end the process
        except OSError:  # no file, or no room: in memory
            self._kept = None
            return mmap.mmap(-1, size)
        self._size += -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._index[name] = (offset, size, 0)
        mapped = mmap.mmap(self._file, size, offset=offset)
        self._maps.append(mapped)
        return mapped

    def _open(self, path: Path) -> bool:
        """Whether `path` is a whole file of such arrays; each is read and its checksum compared."""
        try:
            self._file = os.open(path, os.O_RDONLY)
            size = os.fstat(self._file).st_size
            tail = os.pread(self._file, _TAIL, size - _TAIL) if size > _TAIL else b""
            length = int.from_bytes(tail[:8], "little")
            if tail[8:] != _MAGIC or not 0 < length <= size - _TAIL:
                raise ValueError(path)
            for name, (offset, stored, checksum) in json.loads(os.pread(self._file, length, size - _TAIL - length)).items():
                with mmap.mmap(self._file, stored, access=mmap.ACCESS_READ, offset=offset) as mapped:
                    if _checksum(mapped) != checksum:
                        raise ValueError(path)
                self._index[name] = (offset, stored, checksum)
            with suppress(OSError):  # it is in use, which not every file system notes by itself
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
        except (OSError, ValueError, TypeError, AttributeError):
            self.close()
            return False
        return True


def _remove_unused(folder: Path) -> None:
    for pattern, seconds in (("*.arrays", _UNUSED_SECONDS), (".new-*", _LEFT_SECONDS)):
        for path in folder.glob(pattern):
            with suppress(OSError):
                status = path.stat()
                if time.time() - max(status.st_atime, status.st_mtime) > seconds:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _checksum(mapped: mmap.mmap) -> int:
    """CRC-32 of all bytes, of which few are held at a time."""
    checksum = 0
    with memoryview(mapped) as view:
        for start in range(0, len(view), _SLICE):
            checksum = zlib.crc32(view[start : start + _SLICE], checksum)
            mapped.madvise(mmap.MADV_DONTNEED)
    return checksum
