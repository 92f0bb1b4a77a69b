"""What one step may hold, checked before a backend writes anything: a wrong block would be another sequence's memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from penstock.backends.architectures.spec import DecoderSpec
from penstock.backends.contract import DeviceConfig, KvSpec, StepBatch

__all__ = ["StepLimits"]


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What a model was created for.

    Attributes:
        max_batch_size: sequences of a step.
        max_batch_tokens: new tokens of a step.
        context: tokens of a sequence.
    """

    vocabulary_size: int
    max_batch_size: int
    max_batch_tokens: int
    context: int
    blocks: int
    block_size: int

    @classmethod
    def of(cls, decoder: DecoderSpec, config: DeviceConfig, kv: KvSpec) -> Self:
        """Those of a model that was created from these."""
        return cls(
            vocabulary_size=decoder.vocabulary_size,
            max_batch_size=config.max_batch_size,
            max_batch_tokens=config.max_batch_tokens,
            context=min(config.max_context or decoder.context_length, decoder.context_length),
            blocks=kv.blocks,
            block_size=kv.block_size,
        )

    def check(self, batch: StepBatch) -> None:
        """Take a batch that the model can compute.

        Raises:
            ValueError: the first field that is out of range, and the range.
        """
        lengths = batch.past_lengths + np.diff(batch.starts)
        if not 0 < len(lengths) <= self.max_batch_size:
            raise ValueError(f"starts: {len(lengths)} sequences in a step; max_batch_size is {self.max_batch_size}")
        if len(batch.token_ids) > self.max_batch_tokens:
            raise ValueError(f"token_ids: {len(batch.token_ids)} in a step; max_batch_tokens is {self.max_batch_tokens}")
        if lengths.max() > self.context:
            raise ValueError(f"past_lengths: a sequence comes to {lengths.max()} tokens; the context holds {self.context}")
        if (np.diff(batch.block_starts) * self.block_size < lengths).any():
            raise ValueError(f"block_starts: a sequence has fewer blocks of {self.block_size} tokens than it needs")
        # Negative numbers, read as unsigned ones, are too large as well.
        if batch.block_ids.view(np.uint32).max() >= self.blocks:
            raise ValueError(f"block_ids: go from 0 to {self.blocks - 1}")
        if batch.token_ids.view(np.uint64).max() >= self.vocabulary_size:
            raise ValueError(f"token_ids: go from 0 to {self.vocabulary_size - 1}")
