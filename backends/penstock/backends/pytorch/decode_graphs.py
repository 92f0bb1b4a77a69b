"""Decode steps of fixed shape, each recorded once and replayed: on an accelerator launching costs more than computing.

A step is padded to a bucket: the next power of two of its sequences, and of the blocks that the longest of them reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penstock.backends.contract import StepBatch
from penstock.backends.pytorch.attention.plan import AttentionPlan, MakeDecoding
from penstock.backends.pytorch.attention.planning import decode_layout, written_slots

__all__ = ["Bucket", "CudaCapture", "DecodeGraphs", "Replay", "StaticStep", "bucket_of", "packed"]

Replay = Callable[[], Tensor]


class Bucket(NamedTuple):
    """The shape of a recorded step: sequences, and blocks that each reads."""

    sequences: int
    width: int


@dataclass(frozen=True, slots=True)
class StaticStep:
    """What a step of fixed shape reads, views of one tensor: ids, positions and written slots [B], bounds [B, 2], table [B, W]."""

    ids: Tensor
    positions: Tensor
    plan: AttentionPlan


def bucket_of(batch: StepBatch, block_size: int, window: int | None) -> tuple[Bucket, NDArray[np.int64], NDArray[np.int64]] | None:
    """The bucket of a step, its table and bounds; None where a sequence has several new tokens, or not all logits are wanted."""
    sequences = len(batch.past_lengths)
    if len(batch.token_ids) != sequences or len(batch.logits_rows) != sequences:
        return None
    table, bounds = decode_layout(batch, range(sequences), block_size, window)
    return Bucket(_power_of_two(sequences), _power_of_two(table.shape[1])), table, bounds


def packed(
    batch: StepBatch, bucket: Bucket, table: NDArray[np.int64], bounds: NDArray[np.int64], block_size: int, spare_block: int
) -> NDArray[np.int64]:
    """What `StaticStep` reads, [B, 5 + W], a column for each. Rows of padding write to the spare block, and see what they write."""
    rows = np.zeros((bucket.sequences, 5 + bucket.width), np.int64)
    rows[:, 2] = spare_block * block_size
    rows[:, 5:] = spare_block
    used = rows[: len(table)]
    used[:, 0], used[:, 1], used[:, 2] = batch.token_ids, batch.positions, written_slots(batch, block_size)
    used[:, 3:5] = bounds
    used[:, 5 : 5 + table.shape[1]] = table
    return rows


class DecodeGraphs:
    """Recorded decode steps by bucket, made when first met; at most (log2 sequences) · (log2 blocks) of them.

    Args:
        run: computes logits [B, vocabulary] of a step.
        capture: records a computation, and gives what replays it over the same memory.
        block_size: tokens of a block.
        spare_block: the block that padding writes to.
        window: see `plan_attention`.
        device: where the steps run.
        decoding: how they attend.
    """

    def __init__(
        self,
        run: Callable[[StaticStep], Tensor],
        capture: Callable[[Replay], Replay],
        *,
        block_size: int,
        spare_block: int,
        window: int | None,
        device: torch.device,
        decoding: MakeDecoding,
    ) -> None:
        self._run, self._capture, self._device, self._decoding = run, capture, device, decoding
        self._block_size, self._spare_block, self._window = block_size, spare_block, window
        self._recorded: dict[Bucket, tuple[Tensor, Tensor, Replay]] = {}

    def __len__(self) -> int:
        """How many are recorded."""
        return len(self._recorded)

    def step(self, batch: StepBatch) -> Tensor | None:
        """Logits [S, vocabulary] on the device, valid until the next step; None where the step is not one of decoding alone."""
        laid_out = bucket_of(batch, self._block_size, self._window)
        if laid_out is None:
            return None
        bucket, table, bounds = laid_out
        rows = torch.from_numpy(packed(batch, bucket, table, bounds, self._block_size, self._spare_block))
        known = self._recorded.get(bucket)
        if known is None:
            known = self._recorded[bucket] = self._record(rows)
        host, inputs, replay = known
        host.copy_(rows)
        inputs.copy_(host, non_blocking=True)  # ordered before the replay, on the same stream
        return replay()[: len(table)]

    def _record(self, rows: Tensor) -> tuple[Tensor, Tensor, Replay]:
        """Pinned host memory, the inputs on the device and what replays a step over them; `rows` are the first one's inputs."""
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=self._device.type == "cuda")
        inputs = rows.to(self._device)
        ids, positions, written = (inputs[:, column] for column in range(3))
        group = self._decoding(None, inputs[:, 5:], inputs[:, 3:5])
        step = StaticStep(ids, positions, AttentionPlan(written, (), (group,)))
        return host, inputs, self._capture(lambda: self._run(step))


class CudaCapture:
    """Records what computations launch as CUDA graphs that share their memory.

    One is replayed at a time, and its output is read before the next one's. The memory is given back with the last of them, and
    PyTorch takes no other graph into it then: each model has a `CudaCapture` of its own.
    """

    def __init__(self) -> None:
        self._pool: Any = None  # a handle that torch names by no public type

    def __call__(self, compute: Replay) -> Replay:
        """Record `compute`, run before on a stream of its own, so that libraries have set themselves up."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = compute()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
