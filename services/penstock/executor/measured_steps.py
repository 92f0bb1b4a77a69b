"""Steps as a measurement takes them: equal sequences on the first blocks of a cache, each behind a past that stands there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from penstock.backends.contract import CANONICAL_DTYPES, GenerativeModel, KvChunk, StepBatch

__all__ = ["MeasuredSteps"]

# Tokens of a sequence that are imported at a time.
_PIECE = 128
# A past of fewer is quicker computed.
_LONG = 16


class MeasuredSteps:
    """Runs and times steps of a model. Knows what stands in the cache, and puts there what a step lacks.

    Every sequence of a batch has as many blocks, end to end from block 0 on. So the first one's are the same in every batch.

    Args:
        model: nobody else may write to its cache.
        max_batch_tokens: of one step.
        clock: tells seconds.
        imports: whether a long past is imported; else it is computed. No step takes longer for what the keys and values are, so
            these are zeros.

    Attributes:
        import_seconds: that the longest import took.
    """

    def __init__(self, model: GenerativeModel, max_batch_tokens: int, clock: Callable[[], float], *, imports: bool = False) -> None:
        self._model = model
        self._imports = imports
        self.import_seconds = 0.0
        self._most = max_batch_tokens
        self._clock = clock
        self._lengths: list[int] = []
        self._blocks_each = 0

    @property
    def standing(self) -> int:
        """Tokens of the first sequence that are in the cache."""
        return self._lengths[0] if self._lengths else 0

    def room(self, tokens: int) -> int:
        """Sequences of so many tokens that the cache holds."""
        return self._model.kv.blocks // self._blocks(tokens)

    def run(self, sequences: int, tokens: int, past: int) -> float:
        """Seconds of one step with so many tokens for each sequence, behind `past` ones of each.

        A past that is not in the cache is put there before, which does not count. What stood behind the past is written over.
        """
        self._lay_out(sequences, self._blocks(past + tokens))
        lacking = [s for s, length in enumerate(self._lengths[:sequences]) if length < past]
        if self._imports and past >= _LONG:
            began = self._clock()
            for sequence in lacking:
                self._import(sequence, past)
            self.import_seconds = max(self.import_seconds, self._clock() - began)
        else:
            together = max(1, self._most // max(past, 1))
            for i in range(0, len(lacking), together):
                self._step(lacking[i : i + together], past, 0)
        began = self._clock()
        self._step(range(sequences), tokens, past)
        return max(self._clock() - began, 1e-9)

    def _lay_out(self, sequences: int, blocks_each: int) -> None:
        if blocks_each != self._blocks_each and max(sequences, len(self._lengths)) > 1:
            self._lengths = []
        self._blocks_each = blocks_each
        self._lengths += [0] * (sequences - len(self._lengths))

    def _import(self, sequence: int, past: int) -> None:
        kv, first = self._model.kv, sequence * self._blocks_each
        blocks = range(first, first + self._blocks(past))
        for start in range(self._lengths[sequence], past, _PIECE):
            tokens = range(start, min(start + _PIECE, past))
            zeros = np.zeros(kv.canonical_shape(len(tokens)), CANONICAL_DTYPES[kv.canonical_dtype])
            self._model.import_kv(blocks, KvChunk(tokens, zeros))
        self._lengths[sequence] = past

    def _step(self, sequences: list[int] | range, tokens: int, past: int) -> None:
        blocks = self._blocks(past + tokens)
        count = len(sequences)
        each = np.arange(count + 1, dtype=np.int32)
        first = np.array(sequences, np.int32) * np.int32(self._blocks_each)
        batch = StepBatch(
            token_ids=np.zeros(count * tokens, np.int64),
            positions=np.tile(np.arange(past, past + tokens), count),
            past_lengths=np.full(count, past, np.int32),
            starts=each * np.int32(tokens),
            block_ids=(first[:, None] + np.arange(blocks, dtype=np.int32)).ravel().astype(np.int32),
            block_starts=each * np.int32(blocks),
            logits_rows=np.arange(1, count + 1, dtype=np.int64) * tokens - 1,
        )
        self._model.step(batch)
        for sequence in sequences:
            self._lengths[sequence] = past + tokens

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._model.kv.block_size)
