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
from penstock.backends.onnxruntime.providers import HOST, Target
from penstock.backends.onnxruntime.weights import FORM, WeightSource
from penstock.backends.safetensors import Weights

__all__ = ["compute_type", "decoder_session", "open_session", "options", "release_unused"]

_BF16 = np.dtype(ml_dtypes.bfloat16)
_FLOAT32 = np.dtype(np.float32)
# Accelerators' attention mostly takes short types alone, and their products with rounded weights are made for float16.
_ON_DEVICES = {DType.F32: _FLOAT32, DType.BF16: _BF16, DType.INT8: np.dtype(np.float16), DType.INT4: np.dtype(np.float16)}


def compute_type(dtype: DType, target: Target) -> np.dtype[Any]:
    """What is computed with, and held in the cache, where weights are of some type."""
    return _ON_DEVICES[dtype] if target.allocated else _FLOAT32


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


def decoder_session(
    spec: ModelSpec, config: DeviceConfig, dtype: DType, target: Target = HOST
) -> tuple[ort.InferenceSession, list[Any]]:
    """A session over a checkpoint's decoder, and what must live as long as it.

    The runtime lays out copies of the weights of its own, and looks at ours no more; so their pages are given back.
    """
    compute = compute_type(dtype, target)
    form = f"{FORM}-{compute.name}"  # scales are of that type
    threads = config.threads or len(os.sched_getaffinity(0))
    context = min(config.max_context or spec.decoder.context_length, spec.decoder.context_length)
    with Weights(spec) as tensors, weight_arrays("onnxruntime", spec, config, dtype, form) as memory:
        source = WeightSource(tensors, dtype, threads, memory, compute)
        try:
            graph = build(spec.decoder, source, context)
        finally:
            source.close()
        chosen = options(threads)
        values = {name: _shared(array) for name, array in source.arrays.items()}
        held: list[Any] = [*source.arrays.values(), *values.values()]
        if target.allocated:  # what is shared as below would have to be in the device's memory; what is given so is copied there
            chosen.add_external_initializers(list(values), list(values.values()))
        else:
            for name, value in values.items():
                chosen.add_initializer(name, value)
        tensors.release()
        session = open_session(graph, chosen, target)
        memory.keep()
        memory.release()
        tensors.release()
        return session, held


def release_unused() -> None:
    """Give back what the C library keeps of memory that was freed: weights of an ended session, say."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def open_session(graph: ir.Model, chosen: ort.SessionOptions, target: Target) -> ort.InferenceSession:
    """A session over a graph whose initialisers `chosen` holds. Of one on an accelerator no node is left to the CPU.

    The runtime wants the file that the graph names to be there, though it never reads it.
    """
    with TemporaryDirectory(prefix="penstock-") as name:
        folder = Path(name)
        (folder / EXTERNAL).touch()
        path = folder / "graph.onnx"
        path.write_bytes(ir.to_proto(graph).SerializeToString())
        if target.provider == HOST.provider:
            return ort.InferenceSession(path, chosen, providers=[target.provider])
        # The CPU must not be named beside it then; and the runtime would start again with the CPU alone where this one fails.
        chosen.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        numbered = {} if target.memory == HOST.memory else {"device_id": str(target.number)}
        return ort.InferenceSession(path, chosen, providers=[(target.provider, numbered)], enable_fallback=0)


def _shared(array: NDArray[Any]) -> ort.OrtValue:
    """A value over an array's own memory."""
    if array.dtype == _BF16:  # no type of numpy's own: handed over as bits
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), ir.DataType.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(array)
