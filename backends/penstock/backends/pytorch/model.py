"""A model in PyTorch: a decoder, a paged cache and the step over both."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.backends.contract import DeviceConfig, DType, KvChunk, KvSpec, ModelSpec, StepBatch, StepOutput, Unsupported
from penstock.backends.kv_memory import count_blocks, free_memory
from penstock.backends.pytorch.cache import CacheCopies, copies_of, described
from penstock.backends.pytorch.decode_graphs import DecodeGraphs, Replay, StaticStep, capture_cuda
from penstock.backends.pytorch.decoder import Decoder
from penstock.backends.pytorch.loading import from_numpy, load_decoder, to_numpy
from penstock.backends.pytorch.planning import plan_attention
from penstock.backends.pytorch.precision import precision_of
from penstock.backends.pytorch.registration import KV_LAYOUT, REGISTRATION
from penstock.backends.step_limits import StepLimits
from penstock.common.service import StartError

__all__ = ["TorchModel"]

BLOCK_SIZE = 16

_CACHE_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class TorchModel:
    """A `GenerativeModel`. Its cache is one tensor, [layers, 2 (key, value), blocks, block size, kv heads, head dim].

    Raises:
        StartError: the device is not there, or its memory holds no cache.
    """

    def __init__(self, spec: ModelSpec, config: DeviceConfig) -> None:
        capabilities = REGISTRATION.capabilities(spec)
        if isinstance(capabilities, Unsupported):
            raise StartError(f"backend torch {capabilities.reason}")
        self._dtype = config.dtype or capabilities.dtypes[0]
        self._device = _find_device(config.device)
        if self._dtype not in capabilities.dtypes:
            raise StartError(f"backend torch has no {self._dtype} for {spec.name}, but {', '.join(capabilities.dtypes)}")
        if config.kv_cache_dtype is not None:
            raise StartError(f"backend torch has no KV cache of {config.kv_cache_dtype}: leave kv_cache_dtype away")
        precision = precision_of(self._dtype, self._device)
        self._threads = config.threads or len(os.sched_getaffinity(0))
        self._window = spec.decoder.sliding_window
        with _threads(self._threads):
            self._decoder: Decoder | None = load_decoder(spec, precision, self._device)
        self._frequencies = torch.from_numpy(spec.decoder.rope.inverse_frequencies()).to(self._device)
        self._kv, cache = self._allocate(spec, config, precision.held)
        self._cache: Tensor | None = cache
        self._copies: CacheCopies | None = copies_of(cache, self._kv)
        self._limits = StepLimits.of(spec.decoder, config, self._kv)
        self._graphs = self._record_by(capture_cuda) if self._device.type == "cuda" else None

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

    def step(self, batch: StepBatch) -> StepOutput:
        """Compute one step; all tokens go through each product together.

        Raises:
            ValueError: the batch is not within what the model was created for.
            RuntimeError: the model is closed, or the device failed.
        """
        self._limits.check(batch)
        self._open()
        with torch.inference_mode(), _threads(self._threads):
            logits = None if self._graphs is None else self._graphs.step(batch)
            return StepOutput(to_numpy(_on_host(self._compute(batch) if logits is None else logits)))

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
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _compute(self, batch: StepBatch) -> Tensor:
        decoder, cache = self._open()
        plan = plan_attention(batch, BLOCK_SIZE, self._window, self._device)
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


def _on_host(logits: Tensor) -> Tensor:
    """The same on the CPU: from a device into pinned memory, which PyTorch keeps for the next step."""
    if logits.device.type == "cpu":
        return logits
    return torch.empty(logits.shape, dtype=logits.dtype, pin_memory=True).copy_(logits)


def _find_device(name: str | None) -> torch.device:
    accelerated = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda:0" if accelerated else "cpu"))
    except RuntimeError as error:
        raise StartError(f"device: {name} is none; cpu and cuda:0 are") from error
    if device.type == "cuda" and not accelerated:
        raise StartError(f"device: PyTorch can not use {name}: {_fault_of_cuda()}; CUDA_VISIBLE_DEVICES=-1 has it run on the CPU")
    if device.type not in {"cpu", "cuda"} or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise StartError(f"device: there is no {name} here; there is {'cuda:0 and cpu' if accelerated else 'cpu'}")
    return device


def _fault_of_cuda() -> str:
    """Why PyTorch says that there is no GPU: of a driver too old, or none that answers, it tells only when asked to begin."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # it has no annotations
    except (RuntimeError, AssertionError) as error:
        return str(error).partition("\n")[0].rstrip(".")
    return "it finds no GPU"


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Compute with so many threads, and leave the process's setting as it was."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
