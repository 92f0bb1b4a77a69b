"""From a checkpoint to a compiled graph, with one copy of the weights in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from typing import Any, Self, TypeVar

from numpy.typing import NDArray

import openvino as ov
from penstock.backends.contract import DeviceConfig, DType, ModelSpec
from penstock.backends.mapped_arrays import weight_arrays
from penstock.backends.openvino.graph import build
from penstock.backends.openvino.properties import OPTIONAL, properties
from penstock.backends.openvino.quantization import FORM
from penstock.backends.openvino.weights import Constants
from penstock.backends.safetensors import Weights

__all__ = ["Source"]

T = TypeVar("T")

# Memory that is read again within this time is in the way for no longer.
_SECONDS = 0.01


class Source:
    """The weights while a model is being made: views of the checkpoint, and what was computed from it, both mapped from files."""

    def __init__(self, spec: ModelSpec, config: DeviceConfig, dtype: DType) -> None:
        self._spec, self._dtype = spec, dtype
        self._kv_cache = config.kv_cache_dtype
        self._threads = config.threads or len(os.sched_getaffinity(0))
        with ExitStack() as opened:
            self._weights = opened.enter_context(Weights(spec))
            self._arrays = opened.enter_context(weight_arrays("openvino", spec, config, dtype, FORM))
            self._opened = opened.pop_all()

    @property
    def embedding(self) -> NDArray[Any]:
        """The table of token embeddings, as the checkpoint has it."""
        return self._weights[self._spec.decoder.weights.embedding]

    def compile(self) -> tuple[ov.CompiledModel, list[NDArray[Any]]]:
        """The compiled graph, and the arrays that it points into, which must outlive it."""
        core = ov.Core()
        has_bf16 = _multiplies_bfloat16(core)
        constants = Constants(self._weights, self._arrays, self._dtype, self._threads, has_bf16=has_bf16)
        try:
            graph = build(self._spec.decoder, constants)
        finally:
            constants.close()
        chosen = properties(self._spec.decoder, self._dtype, self._threads, has_bf16=has_bf16, kv_cache=self._kv_cache)
        if not set(core.get_property("CPU", "SUPPORTED_PROPERTIES")) >= OPTIONAL:
            chosen = {name: value for name, value in chosen.items() if name not in OPTIONAL}
        return self.during(lambda: core.compile_model(graph, "CPU", chosen)), constants.held

    def during(self, work: Callable[[], T]) -> T:
        """Do what reads the weights, and meanwhile let go of pages that it has read. They come back from the files at need."""
        with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
            future = pool.submit(work)
            while wait([future], _SECONDS).not_done:
                self._release()
            self._release()
            return future.result()

    def _release(self) -> None:
        self._weights.release()
        self._arrays.release()

    def keep(self) -> None:
        """Let the next start find what was computed, where the operator wants that."""
        self._arrays.keep()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def _multiplies_bfloat16(core: ov.Core) -> bool:
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
