"""A model in ONNX Runtime: a session over the decoder's graph, a cache of lanes, and the step over both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import onnxruntime as ort
from penstock.backends.contract import DeviceConfig, DType, KvChunk, KvSpec, ModelSpec, StepBatch, StepOutput
from penstock.backends.kv_memory import count_blocks, free_memory
from penstock.backends.onnxruntime.cache import BLOCK_SIZE, LaneCache, bytes_per_block
from penstock.backends.onnxruntime.groups import Group, groups
from penstock.backends.onnxruntime.registration import DTYPES
from penstock.backends.onnxruntime.session import decoder_session, release_unused
from penstock.backends.step_limits import StepLimits
from penstock.common.service import StartError

__all__ = ["OnnxRuntimeModel"]

# Ended sequences keep their lanes until others take their blocks.
_LANES_PER_SEQUENCE = 2
_BINDINGS = 64


class OnnxRuntimeModel:
    """A `GenerativeModel` on the CPU.

    Raises:
        StartError: it has not that type or device, or memory holds no cache.
    """

    def __init__(self, spec: ModelSpec, config: DeviceConfig) -> None:
        self._dtype = config.dtype or DTYPES[0]
        if self._dtype not in DTYPES:
            raise StartError(f"backend onnxruntime has no {self._dtype}, but {', '.join(DTYPES)}")
        if config.device not in {None, "cpu"}:
            raise StartError(f"device: backend onnxruntime decodes on cpu alone, not on {config.device}")
        decoder = spec.decoder
        context = min(config.max_context or decoder.context_length, decoder.context_length)
        self._vocabulary = decoder.vocabulary_size
        self._logits = np.empty((0, self._vocabulary), np.float32)
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._cache: LaneCache | None = None
        self._session, self._held = decoder_session(spec, config, self._dtype)
        try:
            blocks = count_blocks(decoder, config, BLOCK_SIZE, bytes_per_block(decoder), free_memory())
            self._cache = LaneCache(decoder, blocks, min(blocks, _LANES_PER_SEQUENCE * config.max_batch_size), context)
        except BaseException:
            self.close()
            raise
        self._kv = self._cache.kv
        self._limits = StepLimits.of(decoder, config, self._kv)

    @property
    def kv(self) -> KvSpec:
        """The cache it was created with."""
        return self._kv

    @property
    def dtype(self) -> DType:
        """The type it was created with."""
        return self._dtype

    @property
    def device(self) -> str:
        """Where it runs."""
        return "cpu"

    def step(self, batch: StepBatch) -> StepOutput:
        """Compute one step, in as many runs of the graph as it has groups.

        Raises:
            ValueError: the batch is not within what the model was created for.
            RuntimeError: the model is closed, the past of a sequence is not in its cache, or the runtime failed.
        """
        session, cache = self._open()
        self._limits.check(batch)
        count = len(batch.logits_rows)
        if len(self._logits) < count:
            self._logits = np.empty((count, self._vocabulary), np.float32)
        logits = self._logits[:count]
        for group in groups(batch, cache.lanes):
            self._run(session, cache, group, logits)
        return StepOutput(logits)

    def export_kv(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """Copy the KV of `tokens` out of the cache.

        Raises:
            ValueError: `tokens` are not consecutive positions within these blocks.
        """
        return self._open()[1].read(blocks, tokens)

    def import_kv(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Copy a chunk into the cache, converted to its type.

        Raises:
            ValueError: its positions are not within these blocks, or its shape is not this model's.
        """
        self._open()[1].write(blocks, chunk)

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        self._bindings.clear()
        self._session = self._cache = None
        self._logits = self._logits[:0].copy()
        self._held.clear()
        release_unused()

    def _open(self) -> tuple[ort.InferenceSession, LaneCache]:
        if self._session is None or self._cache is None:
            raise RuntimeError("the model is closed")
        return self._session, self._cache

    def _run(self, session: ort.InferenceSession, cache: LaneCache, group: Group, logits: NDArray[np.float32]) -> None:
        rows = group.outputs
        first, last = (rows[0], rows[-1]) if len(rows) else (0, -1)
        together = last - first < len(rows)
        found = logits[first : last + 1] if together else np.empty((len(rows), self._vocabulary), np.float32)
        binding = self._bind(session, cache, group.first_lane, len(group.token_ids))
        for name in ("token_ids", "last_positions", "longest", "logits_rows"):
            array = getattr(group, name)
            binding.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        binding.bind_output("logits", "cpu", 0, np.float32, found.shape, found.ctypes.data)
        session.run_with_iobinding(binding)
        if not together:
            logits[rows] = found

    def _bind(self, session: ort.InferenceSession, cache: LaneCache, first: int, count: int) -> Any:
        """A binding of lanes `first` … `first + count - 1`: of the memory alone, which is read and written where it lies."""
        if (first, count) not in self._bindings:
            if len(self._bindings) >= _BINDINGS:
                self._bindings.pop(next(iter(self._bindings)))
            binding = self._bindings[first, count] = session.io_binding()
            shape = (count, *cache.shape)
            for name, array in cache.arrays.items():
                where = array.ctypes.data + first * cache.lane_bytes
                binding.bind_input(name, "cpu", 0, np.float32, shape, where)
                binding.bind_output(f"{name}.out", "cpu", 0, np.float32, shape, where)
        return self._bindings[first, count]
