"""A backend without weights, for tests: deterministic, instant, and telling of every mistake in paging.

A step stores the new token ids in their KV blocks, and the next token is a hash of all ids that stand in the sequence's blocks up
to there, read back through its block table. A wrong table, a block that was shared or freed too early, or a token that was
computed twice or not at all changes every token from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import (
    Availability,
    Available,
    Capabilities,
    DeviceConfig,
    DType,
    GenerativeModel,
    KvChunk,
    KvSpec,
    ModelSpec,
    Registration,
    StepBatch,
    StepOutput,
)
from penstock.backends.kv_blocks import check_blocks, check_chunk, check_native, transfer_slots
from penstock.backends.kv_copies import native_layout
from penstock.backends.step_limits import StepLimits

__all__ = ["BLOCK_SIZE", "REGISTRATION", "FakeModel", "next_token"]

BLOCK_SIZE = 16

_DEFAULT_CACHE_BYTES = 8 << 20
_BYTES_PER_TOKEN = 8
_LAYOUT = "token-ids"
# An id in the canonical layout: its bytes, the lowest first, which every type that travels holds exactly.
_TOKEN_SHAPE = (1, 1, 4)
_LIKELIEST, _SECOND = 12.0, 10.0
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, Stafford's variant 13 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def next_token(ids: Sequence[int], vocabulary_size: int) -> int:
    """The greedy continuation of `ids`: what a test may expect of the whole suite."""
    terms = _mixed((np.arange(len(ids), dtype=np.uint64) << np.uint64(32)) + np.asarray(ids, np.uint64) + _GAMMA)
    return int(_mixed(np.array([terms.sum(dtype=np.uint64)]))[0] % np.uint64(vocabulary_size))


class FakeModel:
    """Token ids in blocks. `storage` [blocks, block size] holds -1 where nothing was stored."""

    def __init__(self, spec: ModelSpec, config: DeviceConfig) -> None:
        if config.dtype not in {None, DType.F32}:
            raise ValueError(f"dtype: {config.dtype} is none of this backend's; it has f32")
        blocks = (config.kv_cache_bytes or _DEFAULT_CACHE_BYTES) // (BLOCK_SIZE * _BYTES_PER_TOKEN)
        if blocks < 1:
            raise ValueError(
                f"kv_cache_bytes: {config.kv_cache_bytes} holds not one block of {BLOCK_SIZE * _BYTES_PER_TOKEN} bytes"
            )
        size = BLOCK_SIZE * _BYTES_PER_TOKEN
        kv = KvSpec(BLOCK_SIZE, blocks, size, layout=_LAYOUT, dtype="int64", token_shape=_TOKEN_SHAPE)
        self.kv = replace(kv, native_layout=native_layout(_LAYOUT, kv, "int64"))
        self.dtype = DType.F32
        self.device = "cpu"
        self.storage = np.full((blocks, BLOCK_SIZE), -1, np.int64)
        self._limits = StepLimits.of(spec.decoder, config, self.kv)
        self._vocabulary_size = spec.decoder.vocabulary_size
        self._logits = np.zeros((0, self._vocabulary_size), np.float32)

    def step(self, batch: StepBatch) -> StepOutput:
        """Store the new ids, and hash what the blocks hold."""
        self._limits.check(batch)
        counts = np.diff(batch.starts)
        owner = np.repeat(np.arange(len(counts)), counts)
        blocks = batch.block_ids[batch.block_starts[owner] + batch.positions // BLOCK_SIZE]
        self.storage[blocks, batch.positions % BLOCK_SIZE] = batch.token_ids
        rows = batch.logits_rows
        logits = self._blank(len(rows))
        if len(rows):
            hashes = self._hashes(batch, owner[rows], batch.positions[rows] + 1)
            tokens = (hashes % np.uint64(self._vocabulary_size)).astype(np.int64)
            each = np.arange(len(rows))
            logits[each, (tokens + 1) % self._vocabulary_size] = _SECOND
            logits[each, tokens] = _LIKELIEST
        return StepOutput(logits)

    def _blank(self, rows: int) -> NDArray[np.float32]:
        if len(self._logits) < rows:
            self._logits = np.zeros((rows, self._vocabulary_size), np.float32)
        logits = self._logits[:rows]
        logits.fill(0)
        return logits

    def _hashes(self, batch: StepBatch, owner: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
        """One hash per row, over the `lengths` first tokens of its sequence, as they stand in the blocks."""
        needed = -(-lengths // BLOCK_SIZE)
        ends = np.cumsum(needed)
        places = np.arange(ends[-1]) - np.repeat(ends - needed, needed)
        ids = self.storage[batch.block_ids[np.repeat(batch.block_starts[owner], needed) + places]].astype(np.uint64)
        positions = (places[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).astype(np.uint64)
        terms = _mixed((positions << np.uint64(32)) + ids + _GAMMA)
        terms[positions >= np.repeat(lengths, needed).astype(np.uint64)[:, None]] = 0
        return _mixed(np.add.reduceat(terms.sum(axis=1, dtype=np.uint64), ends - needed))

    def export_kv(self, blocks: Sequence[int], tokens: range) -> KvChunk:
        """The bytes of the stored ids, as key and as value."""
        ids = self.storage.ravel()[transfer_slots(self.kv, blocks, tokens)]
        values = np.empty(self.kv.canonical_shape(len(ids)), np.float32)
        values[...] = ids.astype("<i4").view(np.uint8).reshape(len(ids), 1, 4)
        return KvChunk(tokens, values)

    def import_kv(self, blocks: Sequence[int], chunk: KvChunk) -> None:
        """Store the ids of a chunk."""
        slots = transfer_slots(self.kv, blocks, chunk.tokens)
        check_chunk(self.kv, chunk)
        with np.errstate(invalid="ignore"):  # NaN is any number
            self.storage.ravel()[slots] = np.ascontiguousarray(chunk.data[0, 0, :, 0].astype(np.uint8)).view("<i4")[:, 0]

    def export_blocks(self, blocks: Sequence[int]) -> NDArray[np.uint8]:
        """The stored ids of whole blocks."""
        check_blocks(self.kv, blocks)
        return self.storage[np.array(blocks, np.int64)].view(np.uint8)

    def import_blocks(self, blocks: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Store the ids of whole blocks."""
        check_native(self.kv, blocks, data)
        self.storage[np.array(blocks, np.int64)] = np.ascontiguousarray(data).view(np.int64)

    def close(self) -> None:
        """Forget the blocks; a step behind it fails for want of them."""
        self.storage = np.full((0, BLOCK_SIZE), -1, np.int64)


def _probe() -> Availability:
    return Available(devices=("cpu",), version="1")


def _capabilities(_: ModelSpec) -> Capabilities:
    return Capabilities(
        dtypes=(DType.F32,),
        batch_invariant=True,
        export_kv=True,
        import_kv=True,
        kv_layouts=(_LAYOUT,),
        weight_bytes={DType.F32: 1},
    )


def _create(spec: ModelSpec, config: DeviceConfig) -> GenerativeModel:
    return FakeModel(spec, config)


REGISTRATION = Registration("fake", _probe, _capabilities, _create)
