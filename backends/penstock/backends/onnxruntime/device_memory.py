"""Lanes in memory of the device that computes, which the runtime allocates and copies: this process never looks into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import onnxruntime as ort
from penstock.backends.kv_copies import converted
from penstock.backends.onnxruntime.providers import Target
from penstock.backends.onnxruntime.session import open_session, options
from penstock.common.service import StartError

__all__ = ["DeviceLanes"]

_HOST = ("cpu", 0)


class DeviceLanes:
    """`LaneMemory` that is taken whole from the start: no device here has pages that wait to be written to.

    Args:
        names: of keys and values.
        lanes: how many.
        shape: of a lane: kv heads, positions, head dim.
        dtype: of an element.
        target: the device.

    Raises:
        StartError: it has not so much memory.
    """

    def __init__(self, names: Sequence[str], lanes: int, shape: tuple[int, int, int], dtype: np.dtype[Any], target: Target) -> None:
        self._heads, self._capacity, self._dim = shape
        self._dtype, self._kind = dtype, ir.DataType.from_numpy(dtype)
        self._place = target.memory or "", target.number
        self._copier = open_session(_copier(self._kind), options(1), target)
        try:
            self._values = {name: self._allocate(lanes, *shape) for name in names}
            self._scratch = self._allocate(self._capacity, self._dim)
        except Exception as error:  # the runtime raises types of its own, which share no other base
            size = lanes * int(np.prod(shape)) * len(names) * dtype.itemsize
            raise StartError(f"{target.device} has no {size >> 20} MiB for the KV cache; lower kv_cache_gib: {error}") from error
        self.addresses: Mapping[str, int] = {name: value.data_ptr() for name, value in self._values.items()}
        self._clear(lanes)

    def keep(self, lane: int, tokens: int) -> None:
        """Nothing: what else it holds is written over."""

    def copy(self, source: int, target: int, tokens: range) -> None:
        """Copy on the device."""
        for name in self.addresses:
            for head in range(self._heads):
                held, into = (self._at(name, lane, head, tokens.start) for lane in (source, target))
                self._copy(self._place, held, self._place, into, len(tokens))

    def swap(self, one: int, other: int, tokens: int) -> None:
        """Exchange on the device, a head at a time."""
        scratch = self._scratch.data_ptr()
        for name in self.addresses:
            for head in range(self._heads):
                first, second = (self._at(name, lane, head) for lane in (one, other))
                for source, target in ((first, scratch), (second, first), (scratch, second)):
                    self._copy(self._place, source, self._place, target, tokens)

    def read(self, name: str, lane: int, tokens: range) -> NDArray[Any]:
        """A copy in main memory."""
        data = np.empty((self._heads, len(tokens), self._dim), self._dtype)
        for head in range(self._heads):
            self._copy(self._place, self._at(name, lane, head, tokens.start), _HOST, data[head].ctypes.data, len(tokens))
        return data

    def write(self, name: str, lane: int, tokens: range, data: NDArray[Any]) -> None:
        """Copy from main memory."""
        held = np.ascontiguousarray(converted(data, self._dtype))
        for head in range(self._heads):
            self._copy(_HOST, held[head].ctypes.data, self._place, self._at(name, lane, head, tokens.start), len(tokens))

    def _at(self, name: str, lane: int, head: int, position: int = 0) -> int:
        rows = (lane * self._heads + head) * self._capacity + position
        return self.addresses[name] + rows * self._dim * self._dtype.itemsize

    def _allocate(self, *shape: int) -> ort.OrtValue:
        kind, number = self._place
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, int(self._kind), kind, number)

    def _clear(self, lanes: int) -> None:
        """Zeros everywhere: a kernel that reads behind a sequence's end and weighs it with nothing must not read a NaN."""
        zeros = np.zeros((self._heads, self._capacity, self._dim), self._dtype)
        for lane in range(lanes):
            for name in self.addresses:
                self.write(name, lane, range(self._capacity), zeros)

    def _copy(self, of: tuple[str, int], source: int, to: tuple[str, int], target: int, tokens: int) -> None:
        """Copy rows of so many tokens, one behind the other, between two memories; done when it returns."""
        binding, shape = self._copier.io_binding(), (tokens * self._dim,)
        binding.bind_input("x", *of, int(self._kind), shape, source)
        binding.bind_output("y", *to, int(self._kind), shape, target)
        self._copier.run_with_iobinding(binding)


def _copier(kind: ir.DataType) -> ir.Model:
    """The graph that gives what it is given: the runtime copies a bound input to a bound output, wherever they are."""
    x = ir.Value(name="x", shape=ir.Shape(("elements",)), type=ir.TensorType(kind))
    tape = ir.tape.Tape()
    y = tape.op("Identity", [x])
    y.name, y.shape, y.type = "y", x.shape, x.type
    return ir.Model(ir.Graph([x], [y], nodes=tape.nodes, opset_imports={"": 21}, name="copy"), ir_version=10)
