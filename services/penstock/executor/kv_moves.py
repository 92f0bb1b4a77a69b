"""KV that leaves an engine's blocks and comes into them: copies that are asked for at any time and made between its steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.backends.contract import GenerativeModel, KvChunk, ModelLost, NativeKv
from penstock.backends.kv_abilities import native_kv
from penstock.executor.handoff.ports import Exported, Imported, SequenceEnded, always
from penstock.executor.sequence import Sequence, Status

__all__ = ["KvMoves"]


@dataclass(frozen=True, slots=True)
class _Move:
    sequence: Sequence
    make: Callable[[], NDArray[Any] | None]
    done: Callable[[Any], None]
    wanted: Callable[[], bool] = always


class KvMoves:
    """Copies that wait to be made, in the order in which they were asked for. All of it in the engine's thread.

    Nothing is read of a sequence that has not been computed, and nothing written but the blocks that were reserved for what it
    receives: a cached block, which others share, stays as it is.
    """

    def __init__(self, model: GenerativeModel) -> None:
        self._model = model
        self._block_size = model.kv.block_size
        self._waiting: deque[_Move] = deque()

    def __bool__(self) -> bool:
        """Whether any wait."""
        return bool(self._waiting)

    def ask_export(self, sequence: Sequence, tokens: range, done: Exported, wanted: Callable[[], bool], *, native: bool) -> None:
        """Copy KV out of a sequence's blocks, unless it is not wanted any more by then, and tell `done`."""
        export = self._export_native if native else self._export
        self._waiting.append(_Move(sequence, partial(export, sequence, tokens), done, wanted))

    def ask_import(self, sequence: Sequence, tokens: range, data: NDArray[Any], done: Imported, *, native: bool) -> None:
        """Copy KV into a sequence's blocks, and tell `done`."""
        bring = self._import_native if native else self._import
        self._waiting.append(_Move(sequence, partial(bring, sequence, tokens, data), done))

    def make(self, until: float, before_each: Callable[[], None]) -> None:
        """Make one copy, and more until this time.

        Raises:
            ModelLost: there is no more model.
        """
        while self._waiting:
            move = self._waiting.popleft()
            if not move.wanted():
                move.done(SequenceEnded("it is not wanted any more"))
                continue
            before_each()
            self._make(move)
            if time.monotonic() >= until:
                return

    def give_up(self) -> None:
        """Answer all that is asked for: every sequence has ended."""
        while self._waiting:
            self._waiting.popleft().done(SequenceEnded("the engine has ended"))

    def _make(self, move: _Move) -> None:
        if move.sequence.status is Status.DONE:
            move.done(SequenceEnded("the sequence has ended"))
            return
        try:
            answer: NDArray[Any] | Exception | None = move.make()
        except ModelLost as error:
            move.done(error)
            raise
        except Exception as error:  # noqa: BLE001 - a refusal, or whatever a backend raises: who asked decides
            answer = error
        move.done(answer)

    def _export(self, sequence: Sequence, tokens: range) -> NDArray[Any]:
        blocks = self._computed_blocks(sequence, tokens)
        return self._model.export_kv(blocks, tokens).data

    def _export_native(self, sequence: Sequence, tokens: range) -> NDArray[Any]:
        blocks = self._computed_blocks(sequence, tokens)
        return self._native(tokens).export_blocks(blocks[tokens.start // self._block_size :])

    def _import(self, sequence: Sequence, tokens: range, data: NDArray[Any]) -> None:
        blocks = self._reserved_blocks(sequence, tokens)
        self._model.import_kv(blocks, KvChunk(tokens, data))

    def _import_native(self, sequence: Sequence, tokens: range, data: NDArray[Any]) -> None:
        blocks = self._reserved_blocks(sequence, tokens)
        if tokens.stop % self._block_size and tokens.stop != len(sequence.ids):
            raise ValueError(f"{tokens} must end with a block of {self._block_size} tokens, or with the sequence")
        model, blocks = self._native(tokens), blocks[tokens.start // self._block_size :]
        if data.dtype != np.uint8 or data.ndim != 2 or len(data) != len(blocks):
            raise ValueError(f"{data.dtype}{list(data.shape)} is not {len(blocks)} blocks of bytes")
        model.import_blocks(blocks, data)

    def _computed_blocks(self, sequence: Sequence, tokens: range) -> list[int]:
        """The blocks of a sequence up to the end of `tokens`."""
        if not _within(tokens, 0, sequence.computed):
            raise ValueError(f"{tokens} is not within the {sequence.computed} tokens that are computed")
        return self._blocks_up_to(sequence, tokens.stop)

    def _reserved_blocks(self, sequence: Sequence, tokens: range) -> list[int]:
        """The same, of a sequence that receives just these tokens."""
        if sequence.status is not Status.RECEIVING:
            raise ValueError("the sequence does not receive KV")
        if not _within(tokens, sequence.computed, len(sequence.ids)):
            raise ValueError(f"{tokens} is not within the reserved tokens {sequence.computed} to {len(sequence.ids)}")
        return self._blocks_up_to(sequence, tokens.stop)

    def _blocks_up_to(self, sequence: Sequence, tokens: int) -> list[int]:
        blocks: list[int] = sequence.table[: -(-tokens // self._block_size)].tolist()
        return blocks

    def _native(self, tokens: range) -> NativeKv:
        native = native_kv(self._model)
        if native is None:
            raise ValueError("the backend's blocks go to no other as they are")
        if tokens.start % self._block_size:
            raise ValueError(f"{tokens} must begin with a block of {self._block_size} tokens")
        return native


def _within(tokens: range, first: int, end: int) -> bool:
    return tokens.step == 1 and first <= tokens.start <= tokens.stop <= end
