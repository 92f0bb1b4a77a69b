"""A model in ONNX Runtime: a session over the decoder's graph, a cache of lanes, and the step over both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import onnxruntime as ort
from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import DeviceConfig, DType, KvChunk, KvSpec, ModelSpec, StepBatch, StepOutput
from penstock.backends.kv_memory import count_blocks, free_memory
from penstock.backends.mapped_arrays import fitting
from penstock.backends.onnxruntime.cache import BLOCK_SIZE, LaneCache, bytes_per_block, device_cache
from penstock.backends.onnxruntime.groups import Group, groups
from penstock.backends.onnxruntime.providers import HOST, Target
from penstock.backends.onnxruntime.session import compute_type, decoder_session, release_unused
from penstock.backends.step_limits import StepLimits
from penstock.common.service import StartError

__all__ = ["OnnxRuntimeModel"]

# Ended sequences keep their lanes, of which new ones copy prefixes, until others take their blocks: so many for each that may run,
# if their address space is not beyond this, but always twice as many. So many have to come before one that only waits, for KV or
# for room in a step, could lose its lane as the one that was not used for longest.
_LANES_PER_SEQUENCE = 16
_ADDRESS_SPACE = 1 << 43
_BINDINGS = 64


class OnnxRuntimeModel:
    """A `GenerativeModel`.

    Args:
        spec: the model.
        config: what is asked; its type and device were decided on already.
        dtype: of the weights.
        target: where it runs.

    Raises:
        StartError: memory holds no cache, or nobody said how much of an accelerator's it may take.
    """

    def __init__(self, spec: ModelSpec, config: DeviceConfig, dtype: DType, target: Target = HOST) -> None:
        if target.allocated and config.kv_cache_bytes is None:
            raise StartError(f"kv_cache_gib: has to be given, since onnxruntime does not tell what {target.device} has free")
        decoder = spec.decoder
        self._dtype, self._target = dtype, target
        self._vocabulary = decoder.vocabulary_size
        self._logits = np.empty((0, self._vocabulary), np.float32)
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._cache: LaneCache | None = None
        self._session, self._held = fitting(lambda: decoder_session(spec, config, dtype, target))
        try:
            self._cache = _make_cache(decoder, config, compute_type(dtype, target), target)
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
        return self._target.device

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
            RuntimeError: another sequence has taken the lane that they lay in.
        """
        return self._open()[1].read(blocks, tokens)

    def import_kv(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Copy a chunk into the cache, converted to its type.

        Raises:
            ValueError: its positions are not within these blocks, or its shape is not this model's.
            RuntimeError: another sequence has taken the lane that the tokens before it lay in.
        """
        self._open()[1].write(blocks, chunk)

    def copy_prefix(self, source: Sequence[int], target: Sequence[int]) -> int:
        """Copy whole blocks of KV into the first ones of a new sequence; how many were there to be copied.

        Raises:
            ValueError: a block is not of this cache or on both sides, or they are not as many.
            RuntimeError: the model is closed.
        """
        return self._open()[1].copy_prefix(source, target)

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
            shape, place = (count, *cache.shape), (self._target.memory, self._target.number)
            kind = int(ir.DataType.from_numpy(cache.dtype))
            for name, address in cache.memory.addresses.items():
                where = address + first * cache.lane_bytes
                binding.bind_input(name, *place, kind, shape, where)
                binding.bind_output(f"{name}.out", *place, kind, shape, where)
        return self._bindings[first, count]


def _make_cache(decoder: DecoderSpec, config: DeviceConfig, dtype: np.dtype[Any], target: Target) -> LaneCache:
    context = min(config.max_context or decoder.context_length, decoder.context_length)
    if target.allocated:
        lanes = count_blocks(decoder, config, context, bytes_per_block(decoder, context, dtype), free=0)
        return device_cache(decoder, lanes, context, dtype, target)
    blocks = count_blocks(decoder, config, BLOCK_SIZE, bytes_per_block(decoder), free_memory())
    addressable = _ADDRESS_SPACE // (bytes_per_block(decoder) * -(-context // BLOCK_SIZE))
    lanes = max(2 * config.max_batch_size, min(_LANES_PER_SEQUENCE * config.max_batch_size, addressable))
    return LaneCache(decoder, blocks, min(blocks, lanes), context)
