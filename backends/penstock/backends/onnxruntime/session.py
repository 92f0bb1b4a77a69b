"""Sessions: how the runtime is set up, and how weights reach it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import onnxruntime as ort
from penstock.backends.contract import DeviceConfig, DType, ModelSpec
from penstock.backends.mapped_arrays import weight_arrays
from penstock.backends.onnxruntime.graph import EXTERNAL, build
from penstock.backends.onnxruntime.weights import WeightSource
from penstock.backends.safetensors import Weights

__all__ = ["decoder_session", "options", "release_unused"]

_BF16 = np.dtype(ml_dtypes.bfloat16)


def options(threads: int) -> ort.SessionOptions:
    """Options of every session.

    Threads spin between the nodes of a run, which are short, and stop at its end: other services share the cores. Memory is not
    planned by the shapes of earlier runs, since no two steps need have the same.
    """
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.enable_mem_pattern = False
    chosen.log_severity_level = 3
    chosen.add_session_config_entry("session.force_spinning_stop", "1")
    return chosen


def decoder_session(spec: ModelSpec, config: DeviceConfig, dtype: DType) -> tuple[ort.InferenceSession, list[Any]]:
    """A session over a checkpoint's decoder, and what must live as long as it.

    The runtime lays out copies of the weights of its own, and looks at ours no more; so their pages are given back.
    """
    threads = config.threads or len(os.sched_getaffinity(0))
    context = min(config.max_context or spec.decoder.context_length, spec.decoder.context_length)
    with Weights(spec) as tensors, weight_arrays("onnxruntime", spec, config, dtype) as memory:
        source = WeightSource(tensors, dtype, threads, memory)
        try:
            graph = build(spec.decoder, source, context)
        finally:
            source.close()
        chosen = options(threads)
        held: list[Any] = []
        for name, array in source.arrays.items():
            value = _shared(array)
            chosen.add_initializer(name, value)
            held += [array, value]
        tensors.release()
        session = _load(graph, chosen)
        memory.keep()
        memory.release()
        tensors.release()
        return session, held


def release_unused() -> None:
    """Give back what the C library keeps of memory that was freed: weights of an ended session, say."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _load(graph: ir.Model, chosen: ort.SessionOptions) -> ort.InferenceSession:
    """A session over a graph whose initialisers `chosen` holds.

    The runtime wants the file that the graph names to be there, though it never reads it.
    """
    with TemporaryDirectory(prefix="penstock-") as name:
        folder = Path(name)
        (folder / EXTERNAL).touch()
        (folder / "graph.onnx").write_bytes(ir.to_proto(graph).SerializeToString())
        return ort.InferenceSession(folder / "graph.onnx", chosen, providers=["CPUExecutionProvider"])


def _shared(array: NDArray[Any]) -> ort.OrtValue:
    """A value over an array's own memory."""
    if array.dtype == _BF16:  # no type of numpy's own: handed over as bits
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), ir.DataType.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)
