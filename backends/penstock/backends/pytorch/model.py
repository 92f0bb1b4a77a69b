"""A model in PyTorch: a decoder, a paged cache and the step over both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.backends.contract import (
    DeviceConfig,
    DType,
    KvChunk,
    KvSpec,
    ModelSpec,
    StepBatch,
    StepOutput,
    TopOutput,
    TopRequest,
    Unsupported,
)
from penstock.backends.kv_memory import count_blocks, free_memory
from penstock.backends.pytorch.attention.plan import Attention
from penstock.backends.pytorch.attention.planning import plan_attention
from penstock.backends.pytorch.cache import CacheCopies, copies_of, described
from penstock.backends.pytorch.decode_graphs import CudaCapture, DecodeGraphs, Replay, StaticStep
from penstock.backends.pytorch.decoder import Decoder
from penstock.backends.pytorch.device import current, find_device, threads
from penstock.backends.pytorch.loading import from_numpy, load_decoder, to_numpy
from penstock.backends.pytorch.registration import KV_LAYOUT, REGISTRATION
from penstock.backends.pytorch.top import MOST_TOP, ToldRows, on_host
from penstock.backends.pytorch.tuning import tuning_of
from penstock.backends.step_limits import StepLimits
from penstock.common.heap import keep_freed_memory
from penstock.common.service import StartError

__all__ = ["TorchModel"]

BLOCK_SIZE = 16

_CACHE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class TorchModel:
    """A `GenerativeModel`. Its cache is one tensor, [layers, 2 (key, value), blocks, block size, kv heads, head dim].

    Args:
        spec: the model.
        config: what the operator asks.
        attention: how it attends; None: on an accelerator by what is quickest there, on the processor by what always is.
        most_top: see `TopLogits`; None: as many as are worth while on an accelerator, 0 on the processor.

    Raises:
        StartError: the device is not there, computes no attention, or its memory holds no cache.
    """

    def __init__(
        self, spec: ModelSpec, config: DeviceConfig, attention: Attention | None = None, *, most_top: int | None = None
    ) -> None:
        capabilities = REGISTRATION.capabilities(spec)
        if isinstance(capabilities, Unsupported):
            raise StartError(f"backend torch {capabilities.reason}")
        self._dtype = config.dtype or capabilities.dtypes[0]
        self._device = find_device(config.device)
        if self._dtype not in capabilities.dtypes:
            raise StartError(f"backend torch has no {self._dtype} for {spec.name}, but {', '.join(capabilities.dtypes)}")
        if config.kv_cache_dtype is not None:
            raise StartError(f"backend torch has no KV cache of {config.kv_cache_dtype}: leave kv_cache_dtype away")
        if self._device.type == "cpu":
            keep_freed_memory()
        tuning = tuning_of(spec.decoder, self._dtype, self._device, BLOCK_SIZE, attention)
        self._attention, self._ways = tuning.attention, tuning.ways
        self._threads = config.threads or len(os.sched_getaffinity(0))
        self._window = spec.decoder.sliding_window
        with threads(self._threads):
            self._decoder: Decoder | None = load_decoder(spec, tuning.precision, self._device)
        self._frequencies = torch.from_numpy(spec.decoder.rope.inverse_frequencies()).to(self._device)
        self._kv, cache = self._allocate(spec, config, tuning.precision.held)
        self._cache: Tensor | None = cache
        self._copies: CacheCopies | None = copies_of(cache, self._kv)
        self._limits = StepLimits.of(spec.decoder, config, self._kv)
        self._graphs = self._record_by(CudaCapture()) if self._device.type == "cuda" else None
        self._told = ToldRows()
        self._most_top = (0 if self._device.type == "cpu" else MOST_TOP) if most_top is None else most_top

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
        return str(self._device)

    @property
    def ways(self) -> Mapping[str, str]:
        """How it attends and multiplies, as `Tuned`."""
        return self._ways

    def step(self, batch: StepBatch) -> StepOutput:
        """Compute one step; all tokens go through each product together.

        Raises:
            ValueError: the batch is not within what the model was created for.
            RuntimeError: the model is closed, or the device failed.
        """
        with self._computing():
            return StepOutput(to_numpy(on_host(self._logits(batch))))

    @property
    def most_top(self) -> int:
        """How many of a row's likeliest tokens may be asked for."""
        return self._most_top

    def step_top(self, batch: StepBatch, request: TopRequest) -> TopOutput:
        """As `step`, of each row what is asked for in its place; the device finds it.

        Raises:
            ValueError: the batch is not within what the model was created for.
            RuntimeError: the model is closed, or the device failed.
        """
        with self._computing():
            return self._told.tell(self._logits(batch), request)

    def rows_of_top(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the last `step_top` that it did not tell whole.

        Raises:
            RuntimeError: the model is closed, another step has been made, or the device failed.
        """
        with self._computing():
            return self._told.whole(rows)

    def export_kv(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """Copy the KV of `tokens` out of the cache.

        Raises:
            ValueError: `tokens` are not consecutive positions within these blocks.
        """
        return self._copies_open().read(blocks, tokens)

    def import_kv(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Copy a chunk into the cache, converted to its type.

        Raises:
            ValueError: its positions are not within these blocks, or its shape or type is not this model's.
        """
        self._copies_open().write(blocks, chunk)

    def export_blocks(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """Copy whole blocks out of the cache as they lie.

        Raises:
            ValueError: a block is not of this cache.
        """
        return self._copies_open().read_blocks(blocks)

    def import_blocks(self, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Copy whole blocks into the cache.

        Raises:
            ValueError: a block is not of this cache, or the bytes are not so many.
        """
        self._copies_open().write_blocks(blocks, data)

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        self._decoder = self._cache = self._copies = self._graphs = None
        self._told.forget()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.inference_mode(), threads(self._threads), current(self._device):
            yield

    def _logits(self, batch: StepBatch) -> Tensor:
        """[R, vocabulary] on the device, valid until the next step."""
        self._limits.check(batch)
        self._open()
        self._told.forget()
        logits = None if self._graphs is None else self._graphs.step(batch)
        return self._compute(batch) if logits is None else logits

    def _compute(self, batch: StepBatch) -> Tensor:
        decoder, cache = self._open()
        plan = plan_attention(batch, BLOCK_SIZE, self._window, self._device, self._attention)
        angles = self._angles(self._tensor(batch.positions))
        logits: Tensor = decoder(self._tensor(batch.token_ids), angles, self._tensor(batch.logits_rows), plan, cache)
        return logits

    def _compute_static(self, step: StaticStep) -> Tensor:
        decoder, cache = self._open()
        logits: Tensor = decoder(step.ids, self._angles(step.positions), None, step.plan, cache)
        return logits

    def _angles(self, positions: Tensor) -> Tensor:
        return positions[:, None].float() * self._frequencies

    def _record_by(self, capture: Callable[[Replay], Replay]) -> DecodeGraphs:
        return DecodeGraphs(
            self._compute_static,
            capture,
            block_size=BLOCK_SIZE,
            spare_block=self._kv.blocks,
            window=self._window,
            device=self._device,
            decoding=self._attention.decoding,
        )

    def _open(self) -> tuple[Decoder, Tensor]:
        if self._decoder is None or self._cache is None:
            raise RuntimeError("the model is closed")
        return self._decoder, self._cache

    def _copies_open(self) -> CacheCopies:
        if self._copies is None:
            raise RuntimeError("the model is closed")
        return self._copies

    def _tensor(self, values: NDArray[np.int64]) -> Tensor:
        return from_numpy(values).to(self._device)

    def _allocate(self, spec: ModelSpec, config: DeviceConfig, dtype: torch.dtype) -> tuple[KvSpec, Tensor]:
        decoder = spec.decoder
        bytes_per_block = decoder.layers * 2 * BLOCK_SIZE * decoder.kv_heads * decoder.head_dim * dtype.itemsize
        free = torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else free_memory()
        blocks = count_blocks(decoder, config, BLOCK_SIZE, bytes_per_block, free)
        # Cleared, since whole blocks are read, and under a mask zeros keep NaN out. Pages are not taken before they are written.
        # The block behind the last one is what the padding of recorded steps writes to.
        shape = (decoder.layers, 2, blocks + 1, BLOCK_SIZE, decoder.kv_heads, decoder.head_dim)
        cache = torch.zeros(shape, dtype=dtype, device=self._device)
        token_shape = (decoder.layers, decoder.kv_heads, decoder.head_dim)
        return described(KvSpec(BLOCK_SIZE, blocks, bytes_per_block, KV_LAYOUT, _CACHE_NAMES[dtype], token_shape), dtype), cache
