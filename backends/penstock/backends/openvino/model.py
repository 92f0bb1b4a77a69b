"""A model in OpenVINO: the compiled graph, its cache, and the step over both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import openvino as ov
from penstock.backends.contract import DeviceConfig, DType, KvChunk, KvSpec, ModelSpec, StepBatch, StepOutput, Unsupported
from penstock.backends.kv_memory import count_blocks, free_memory
from penstock.backends.mapped_arrays import fitting
from penstock.backends.openvino import REGISTRATION
from penstock.backends.openvino.cache import BLOCK_SIZE, PagedCache
from penstock.backends.openvino.embedding import embed
from penstock.backends.openvino.halving import LARGEST, SIZES, decoding, halves, halves_are_quicker
from penstock.backends.openvino.padding import pad
from penstock.backends.openvino.source import Source
from penstock.backends.step_limits import StepLimits
from penstock.common.service import StartError

__all__ = ["OpenVinoModel"]


class OpenVinoModel:
    """A `GenerativeModel`.

    Raises:
        StartError: the dtype or device is none of this backend's, or memory holds no cache.
    """

    def __init__(self, spec: ModelSpec, config: DeviceConfig) -> None:
        can = REGISTRATION.capabilities(spec)
        if isinstance(can, Unsupported):
            raise StartError(f"backend openvino {can.reason}")
        if config.device not in {None, "cpu"}:
            raise StartError(f"device: backend openvino runs on cpu alone, not on {config.device}")
        self._dtype = config.dtype or can.dtypes[0]
        if self._dtype not in can.dtypes:
            raise StartError(f"backend openvino has no {self._dtype}, but {', '.join(can.dtypes)}")
        if config.kv_cache_dtype not in (None, *can.kv_dtypes):
            raise StartError(f"backend openvino has no KV cache of {config.kv_cache_dtype}, but {', '.join(can.kv_dtypes)}")
        self._request: ov.InferRequest | None = None
        self._cache: PagedCache | None = None
        self._table: NDArray[Any] = np.empty((0, 0), np.float32)
        self._longest = np.zeros((), np.int32)
        self._halves = False
        fitting(lambda: self._load(spec, config))
        if self._widens and min(config.max_batch_size, self._kv.blocks) >= LARGEST:
            step = decoding(LARGEST)
            self._halves = halves_are_quicker(lambda: self._compute(step), lambda: self._in_halves(step))

    def _load(self, spec: ModelSpec, config: DeviceConfig) -> None:
        with Source(spec, config, self._dtype) as source:
            # The graph's constants are these arrays: it keeps no reference of its own.
            compiled, self._held = source.compile()
            self._widens = self._dtype is not DType.F32 and compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32
            self._table = source.embedding
            self._request = compiled.create_infer_request()
            self._cache = self._allocate(compiled, spec, config, source)
            source.keep()

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
        """Compute one step; all tokens go through each product together, or half of them where that is quicker.

        Raises:
            ValueError: the batch is not within what the model was created for.
            RuntimeError: the model is closed, or the plug-in failed.
        """
        self._open()
        self._limits.check(batch)
        size = len(batch.past_lengths)
        if self._halves and size in SIZES and len(batch.token_ids) == size:
            return self._in_halves(batch)
        return self._compute(batch)

    def _in_halves(self, batch: StepBatch) -> StepOutput:
        first, second = halves(batch)
        logits = self._compute(first).logits.copy()  # what one gives is valid until the next
        return StepOutput(np.concatenate((logits, self._compute(second).logits)))

    def _compute(self, batch: StepBatch) -> StepOutput:
        request, cache = self._open()
        batch = pad(batch, cache.scratch) if self._widens else batch
        self._longest[...] = (batch.past_lengths + np.diff(batch.starts)).max()
        embedded = embed(self._table, batch.token_ids)
        request.set_tensor("embedded", ov.Tensor(embedded, shared_memory=True))
        for name in _FIELDS:
            request.set_tensor(name, ov.Tensor(getattr(batch, name), shared_memory=True))
        request.infer(share_outputs=True)
        return StepOutput(request.get_output_tensor(0).data)

    def export_kv(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """Copy the KV of `tokens` out of the cache.

        Raises:
            ValueError: `tokens` are not consecutive positions within these blocks.
        """
        return self._open()[1].read(blocks, tokens)

    def import_kv(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Copy a chunk into the cache, converted to its type.

        Raises:
            ValueError: its positions are not within these blocks, or its shape or type is not this model's.
        """
        self._open()[1].write(blocks, chunk)

    def export_blocks(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """Copy whole blocks out of the cache as they lie.

        Raises:
            ValueError: a block is not of this cache.
        """
        return self._open()[1].read_blocks(blocks)

    def import_blocks(self, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Copy whole blocks into the cache.

        Raises:
            ValueError: a block is not of this cache, or the bytes are not so many.
        """
        self._open()[1].write_blocks(blocks, data)

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        self._request = self._cache = None
        self._table = self._table[:0].copy()
        self._held.clear()

    def _open(self) -> tuple[ov.InferRequest, PagedCache]:
        if self._request is None or self._cache is None:
            raise RuntimeError("the model is closed")
        return self._request, self._cache

    def _allocate(self, compiled: ov.CompiledModel, spec: ModelSpec, config: DeviceConfig, source: Source) -> PagedCache:
        """A cache of the size that memory allows, once a first step has made the plug-in lay its weights out."""
        self._cache = small = PagedCache(compiled, blocks=1)
        self._attach(small)
        source.during(self._warm_up)
        blocks = count_blocks(spec.decoder, config, BLOCK_SIZE, small.kv.bytes_per_block, free_memory())
        cache = PagedCache(compiled, blocks)
        self._attach(cache)
        self._kv = cache.kv
        self._limits = StepLimits.of(spec.decoder, config, self._kv)
        return cache

    def _attach(self, cache: PagedCache) -> None:
        request, _ = self._open()
        for name, tensor in cache.tensors.items():
            request.set_tensor(name, tensor)
        request.set_tensor("longest", ov.Tensor(self._longest, shared_memory=True))

    def _warm_up(self) -> None:
        for tokens in (BLOCK_SIZE, 1):
            self._compute(_only(tokens))


_FIELDS = ("positions", "past_lengths", "starts", "block_ids", "block_starts", "logits_rows")


def _only(tokens: int) -> StepBatch:
    """A step of one sequence in block 0."""
    return StepBatch(
        token_ids=np.zeros(tokens, np.int64),
        positions=np.arange(tokens, dtype=np.int64),
        past_lengths=np.zeros(1, np.int32),
        starts=np.array([0, tokens], np.int32),
        block_ids=np.zeros(1, np.int32),
        block_starts=np.array([0, 1], np.int32),
        logits_rows=np.array([tokens - 1], np.int64),
    )
