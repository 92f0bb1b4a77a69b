"""A model in TensorRT: an engine, the cache that it is bound to, and the step over both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.backends.contract import DeviceConfig, DType, KvChunk, KvSpec, ModelSpec, StepBatch, StepOutput, TopOutput, TopRequest
from penstock.backends.kv_memory import count_blocks
from penstock.backends.pytorch.cache import CacheCopies, copies_of, described
from penstock.backends.pytorch.top import MOST_TOP, ToldRows
from penstock.backends.step_limits import StepLimits
from penstock.backends.tensorrt.api import TensorRt
from penstock.backends.tensorrt.building import EngineBuilder
from penstock.backends.tensorrt.device import Device
from penstock.backends.tensorrt.execution import Executions
from penstock.backends.tensorrt.memory import kv_rows
from penstock.backends.tensorrt.plans import PlanCache
from penstock.backends.tensorrt.profiles import make_profiles
from penstock.backends.tensorrt.runs import plan_runs
from penstock.common.service import StartError

__all__ = ["BLOCK_SIZE", "DTYPES", "KV_LAYOUT", "TensorRtModel"]

BLOCK_SIZE = 16
KV_LAYOUT = "layer,kv,block,token,head,dim"
DTYPES = {DType.BF16: torch.bfloat16, DType.F32: torch.float32}


class TensorRtModel:
    """A `GenerativeModel`. Its cache is one tensor, [layers, 2 (key, value), slots, kv heads, head dim], the canonical layout.

    Args:
        spec: the model.
        config: what the operator asks.
        trt: TensorRT.
        device: where it runs.
        plans: the folder of the plans that earlier starts built; None: they are kept nowhere.

    Raises:
        StartError: the dtype is none of this backend's, TensorRT can not build the model, or memory holds no cache.
    """

    def __init__(self, spec: ModelSpec, config: DeviceConfig, trt: TensorRt, device: Device, plans: Path | None) -> None:
        self._dtype = config.dtype or next(iter(DTYPES))
        if self._dtype not in DTYPES:
            raise StartError(f"backend tensorrt has no {self._dtype}, but {', '.join(DTYPES)}")
        self._device, self._window = device, spec.decoder.sliding_window
        self._vocabulary = spec.decoder.vocabulary_size
        self._profiles = make_profiles(spec.decoder, config)
        builder = EngineBuilder(trt, spec, self._dtype, device.identity, self._profiles, PlanCache(plans))
        self._copies: CacheCopies | None = None
        self._told = ToldRows()
        self._executions: Executions | None = None
        try:
            self._executions = executions = Executions(
                trt, builder.engine(), spec.decoder, self._profiles, DTYPES[self._dtype], device
            )
            self._kv, cache = self._allocate(spec, config)
            executions.bind(cache)
            held = cache[:, :, : self._kv.blocks * BLOCK_SIZE]
            blocks = held.view(*cache.shape[:2], self._kv.blocks, BLOCK_SIZE, *cache.shape[3:])
            self._copies = copies_of(blocks, self._kv)
            self._limits = StepLimits.of(spec.decoder, config, self._kv)
        except BaseException:
            self.close()
            raise

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
        return str(self._device.torch)

    def step(self, batch: StepBatch) -> StepOutput:
        """Compute one step: its decodes in as few runs as the profiles allow, and each prefill by itself.

        Raises:
            ValueError: the step is beyond what the model was created for; nothing is written then.
            RuntimeError: the model is closed, or TensorRT or the device failed.
        """
        with self._computed(batch) as logits:
            return StepOutput(logits.cpu().numpy())

    @property
    def most_top(self) -> int:
        """How many of a row's likeliest tokens may be asked for."""
        return MOST_TOP

    def step_top(self, batch: StepBatch, request: TopRequest) -> TopOutput:
        """As `step`, of each row what is asked for in its place; the device finds it.

        Raises:
            ValueError: the step is beyond what the model was created for; nothing is written then.
            RuntimeError: the model is closed, or TensorRT or the device failed.
        """
        with self._computed(batch) as logits:
            return self._told.tell(logits, request)

    def rows_of_top(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows of the last `step_top` that it did not tell whole.

        Raises:
            RuntimeError: the model is closed, another step has been made, or the device failed.
        """
        with torch.inference_mode(), self._device.stream():
            return self._told.whole(rows)

    def export_kv(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """Copy the KV of `tokens` out of the cache.

        Raises:
            ValueError: `tokens` are not consecutive positions within these blocks.
        """
        with self._device.stream():
            return self._open()[1].read(blocks, tokens)

    def import_kv(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Copy a chunk into the cache, converted to its type.

        Raises:
            ValueError: its positions are not within these blocks, or its shape or type is not this model's.
        """
        with self._device.stream():
            self._open()[1].write(blocks, chunk)

    def export_blocks(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """Copy whole blocks out of the cache as they lie.

        Raises:
            ValueError: a block is not of this cache.
        """
        with self._device.stream():
            return self._open()[1].read_blocks(blocks)

    def import_blocks(self, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Copy whole blocks into the cache.

        Raises:
            ValueError: a block is not of this cache, or the bytes are not so many.
        """
        with self._device.stream():
            self._open()[1].write_blocks(blocks, data)

    def close(self) -> None:
        """Give all memory back. Idempotent."""
        if self._executions is not None:
            self._executions.close()
        self._executions = self._copies = None
        self._told.forget()
        self._device.release()

    @contextmanager
    def _computed(self, batch: StepBatch) -> Iterator[Tensor]:
        """A step's logits on the device, to be read on its stream."""
        executions, _ = self._open()
        self._limits.check(batch)
        self._told.forget()
        runs = list(plan_runs(batch, self._profiles, BLOCK_SIZE, self._window, self._kv.blocks * BLOCK_SIZE))
        shape = (len(batch.logits_rows), self._vocabulary)
        with torch.inference_mode(), self._device.stream() as stream:
            logits = torch.empty(shape, dtype=torch.float32, device=self._device.torch)
            for run in runs:
                computed = executions.run(run, stream)
                if len(run.rows):
                    logits.index_copy_(0, torch.from_numpy(run.rows).to(self._device.torch), computed)
            yield logits

    def _open(self) -> tuple[Executions, CacheCopies]:
        if self._executions is None or self._copies is None:
            raise RuntimeError("the model is closed")
        return self._executions, self._copies

    def _allocate(self, spec: ModelSpec, config: DeviceConfig) -> tuple[KvSpec, Tensor]:
        decoder, dtype = spec.decoder, DTYPES[self._dtype]
        bytes_per_block = decoder.layers * 2 * BLOCK_SIZE * decoder.kv_heads * decoder.head_dim * dtype.itemsize
        blocks = count_blocks(decoder, config, BLOCK_SIZE, bytes_per_block, self._device.free_memory())
        # Padding reads the row behind all blocks, unseen: in theirs NaN may stand some day, which no mask hides.
        cache = kv_rows(decoder, blocks * BLOCK_SIZE + 1, dtype, self._device.torch)
        # Who takes a block as it lies reads it all, under a mask.
        cache.zero_()
        token_shape = (decoder.layers, decoder.kv_heads, decoder.head_dim)
        kv = KvSpec(BLOCK_SIZE, blocks, bytes_per_block, KV_LAYOUT, self._dtype.value, token_shape)
        return described(kv, dtype), cache
