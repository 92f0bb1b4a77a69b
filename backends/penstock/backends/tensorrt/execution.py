"""Runs of an engine: a context for each profile, bound to the cache once, and to a run's own tensors before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.tensorrt.api import ICudaEngine, IExecutionContext, TensorRt
from penstock.backends.tensorrt.device import Device
from penstock.backends.tensorrt.graph import INPUTS, LOGITS, cache_name, new_name
from penstock.backends.tensorrt.memory import ALIGNMENT, kv_rows
from penstock.backends.tensorrt.profiles import Profile
from penstock.backends.tensorrt.runs import Run

__all__ = ["Executions"]

_KINDS = ("key", "value")
_INT32_BYTES = 4


class Executions:
    """An engine and what its runs share: one piece of memory for activations, since runs follow one another on one stream.

    Args:
        trt: TensorRT.
        engine: a plan for `profiles`.
        spec: its decoder.
        profiles: in their order in the plan.
        dtype: of the cache.
        device: where it runs.

    Raises:
        RuntimeError: the plan has other inputs, outputs or profiles, or TensorRT makes no context of it.
    """

    def __init__(
        self,
        trt: TensorRt,
        engine: ICudaEngine,
        spec: DecoderSpec,
        profiles: Sequence[Profile],
        dtype: torch.dtype,
        device: Device,
    ) -> None:
        self._spec, self._device = spec, device
        _check(engine, spec, profiles)
        self._engine: ICudaEngine | None = engine  # its contexts do not keep it alive
        most = max(profile.most_tokens for profile in profiles)
        self._new: Tensor = kv_rows(spec, most, dtype, device.torch)
        sizes = [engine.get_device_memory_size_for_profile_v2(i) for i in range(len(profiles))]
        self._activations: Tensor = torch.empty(max(*sizes, ALIGNMENT), dtype=torch.uint8, device=device.torch)
        self._cache: Tensor = self._new[:0]
        self._contexts = [self._context(trt, engine, i) for i in range(len(profiles))]

    def bind(self, cache: Tensor) -> None:
        """Let every context read this cache, [layers, 2 (key, value), slots, kv heads, head dim]."""
        self._cache = cache
        for context in self._contexts:
            for layer in range(self._spec.layers):
                for kind, rows in zip(_KINDS, cache[layer], strict=True):
                    _bind(context, cache_name(kind, layer), rows)

    def run(self, run: Run, stream: int) -> Tensor:
        """Compute a run and write the keys and values of its new tokens into the cache; all of it is enqueued, not awaited.

        Returns:
            float32 [rows computed, vocabulary].

        Raises:
            RuntimeError: TensorRT refuses a binding or the run.
        """
        context = self._contexts[run.profile]
        inputs = self._send(run)  # held until the run is enqueued: what torch frees, it gives to later work of this stream alone
        for name, values in inputs.items():
            _bind(context, name, values)
        logits = torch.empty(
            (len(run.inputs["logits_rows"]), self._spec.vocabulary_size), dtype=torch.float32, device=self._device.torch
        )
        _require(context.set_tensor_address(LOGITS, logits.data_ptr()), LOGITS)
        _require(context.execute_async_v3(stream), "the run")
        written = torch.from_numpy(run.written).to(self._device.torch)
        self._cache.index_copy_(2, written, self._new[:, :, : len(run.written)])
        return logits

    def close(self) -> None:
        """Let go of everything; idempotent."""
        self._contexts.clear()
        self._engine = None
        self._cache = self._new = self._activations = torch.empty(0)

    def _context(self, trt: TensorRt, engine: ICudaEngine, profile: int) -> IExecutionContext:
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise RuntimeError("TensorRT makes no execution context of the engine")
        with self._device.stream() as stream:
            _require(context.set_optimization_profile_async(profile, stream), f"profile {profile}")
        context.set_device_memory(self._activations.data_ptr(), self._activations.nbytes)
        for layer in range(self._spec.layers):
            for kind, rows in zip(_KINDS, self._new[layer], strict=True):
                _require(context.set_tensor_address(new_name(kind, layer), rows.data_ptr()), new_name(kind, layer))
        return context

    def _send(self, run: Run) -> dict[str, Tensor]:
        """The run's inputs on the device, in one transfer."""
        starts, end = {}, 0
        for name in INPUTS:
            starts[name] = end
            end += -(-run.inputs[name].nbytes // ALIGNMENT) * ALIGNMENT // _INT32_BYTES
        packed = np.zeros(end, np.int32)
        for name, start in starts.items():
            packed[start : start + run.inputs[name].size] = run.inputs[name].ravel()
        sent = torch.from_numpy(packed).to(self._device.torch)
        return {name: sent[start : start + run.inputs[name].size].view(run.inputs[name].shape) for name, start in starts.items()}


def _check(engine: ICudaEngine, spec: DecoderSpec, profiles: Sequence[Profile]) -> None:
    names = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}
    named = {make(kind, layer) for make in (cache_name, new_name) for kind in _KINDS for layer in range(spec.layers)}
    if names != {*INPUTS, LOGITS, *named} or engine.num_optimization_profiles != len(profiles):
        raise RuntimeError(f"the engine has other tensors or profiles than its model: {', '.join(sorted(names))[:200]}")


def _bind(context: IExecutionContext, name: str, values: Tensor) -> None:
    _require(context.set_input_shape(name, tuple(values.shape)), f"{name} {list(values.shape)}")
    _require(context.set_tensor_address(name, values.data_ptr()), name)


def _require(accepted: bool, what: str) -> None:
    if not accepted:
        raise RuntimeError(f"TensorRT refuses {what}")
