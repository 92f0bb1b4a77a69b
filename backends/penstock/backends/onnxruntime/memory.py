"""Where lanes lie: in address space of this process, or in memory of a device."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.backends.onnxruntime.lanes import LaneContents
from penstock.common.service import StartError

__all__ = ["HostLanes", "LaneMemory"]

# In Python from 3.13 on; the number is Linux' on every processor but Alpha, MIPS, PowerPC and SPARC, of which none is served.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class LaneMemory(LaneContents, Protocol):
    """Keys or values of each layer, by the name of the graph's input: [lane, kv head, position, head dim], without gaps.

    Attributes:
        addresses: of each one's first lane.
    """

    addresses: Mapping[str, int]

    def read(self, name: str, lane: int, tokens: range) -> NDArray[Any]:
        """[kv head, token, head dim]: good until the lane is next written."""

    def write(self, name: str, lane: int, tokens: range, data: NDArray[Any]) -> None:
        """Copy [kv head, token, head dim] in, converted to the type that is held."""


class HostLanes:
    """Address space whose pages are taken when they are written to: a lane takes what it holds, and gives it back.

    Args:
        names: of keys and values.
        lanes: how many.
        shape: of a lane; it ends where a page does.

    Raises:
        StartError: the system grants not so much address space.
    """

    def __init__(self, names: Sequence[str], lanes: int, shape: tuple[int, int, int]) -> None:
        self._token_bytes = shape[2] * np.dtype(np.float32).itemsize
        self._head_bytes = shape[1] * self._token_bytes
        self._lane_bytes = shape[0] * self._head_bytes
        self._memory = {name: _reserve(lanes * self._lane_bytes) for name in names}
        self.arrays = {name: np.frombuffer(m, np.float32).reshape(lanes, *shape) for name, m in self._memory.items()}
        self.addresses: Mapping[str, int] = {name: array.ctypes.data for name, array in self.arrays.items()}

    def keep(self, lane: int, tokens: int) -> None:
        """Give back the pages that lie wholly behind them."""
        first, last = lane * self._lane_bytes, (lane + 1) * self._lane_bytes
        heads = range(first, last, self._head_bytes)
        unused = [(head + tokens * self._token_bytes, head + self._head_bytes) for head in heads] if tokens else [(first, last)]
        for begin, end in unused:
            page = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            size = end // mmap.PAGESIZE * mmap.PAGESIZE - page
            if size > 0:
                for memory in self._memory.values():
                    memory.madvise(mmap.MADV_DONTNEED, page, size)

    def copy(self, source: int, target: int, tokens: range) -> None:
        """Copy."""
        for array in self.arrays.values():
            array[target, :, tokens.start : tokens.stop] = array[source, :, tokens.start : tokens.stop]

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Exchange, a layer's keys or values at a time."""
        for array in self.arrays.values():
            held = array[one, :, :tokens].copy()
            array[one, :, :tokens] = array[other, :, :tokens]
            array[other, :, :tokens] = held

    def read(self, name: str, lane: int, tokens: range) -> NDArray[Any]:
        """A view."""
        return self.arrays[name][lane, :, tokens.start : tokens.stop]

    def write(self, name: str, lane: int, tokens: range, data: NDArray[Any]) -> None:
        """Copy in."""
        self.arrays[name][lane, :, tokens.start : tokens.stop] = data


def _reserve(size: int) -> mmap.mmap:
    """Address space whose pages are taken when they are first written to, and small ones: a lane is used in part."""
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except (OSError, OverflowError, ValueError) as error:
        raise StartError(f"no {size >> 20} MiB of address space for a layer's KV; lower max_context or max_batch_size") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        _advise(memory)
    return memory


def _advise(memory: Any) -> None:
    try:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError:  # a kernel built without huge pages
        return
