"""Penstock's backend in `engine_vs_genai.py`: the backend's step under a plain loop, greedy, without scheduler and sampler."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from penstock.backends.checkpoint import read_model
from penstock.backends.contract import DeviceConfig, DType, GenerativeModel, StepBatch
from penstock.backends.registry import select
from workload import serve

MAX_BATCH_TOKENS = 2048


def batch(tokens: list[list[int]], past: int, blocks: NDArray[np.int32]) -> StepBatch:
    """A step of sequences of equal lengths, whose blocks are the rows of `blocks`."""
    sequences, length = len(tokens), len(tokens[0])
    starts = np.arange(sequences + 1, dtype=np.int32)
    return StepBatch(
        token_ids=np.array(tokens, np.int64).reshape(-1),
        positions=np.tile(np.arange(past, past + length, dtype=np.int64), sequences),
        past_lengths=np.full(sequences, past, np.int32),
        starts=starts * length,
        block_ids=blocks.reshape(-1),
        block_starts=starts * blocks.shape[1],
        logits_rows=np.arange(1, sequences + 1, dtype=np.int64) * length - 1,
    )


def generate(model: GenerativeModel, prompts: list[list[int]], new: int) -> NDArray[np.int64]:
    """Greedy tokens [sequences, new]."""
    size, length = model.kv.block_size, len(prompts[0])
    held = -(-(length + new) // size)
    table = np.arange(len(prompts) * held, dtype=np.int32).reshape(-1, held)

    def step(tokens: list[list[int]], first: int, past: int) -> NDArray[np.int64]:
        blocks = np.ascontiguousarray(table[first : first + len(tokens), : -(-(past + len(tokens[0])) // size)])
        return model.step(batch(tokens, past, blocks)).logits.argmax(-1)

    together = max(1, MAX_BATCH_TOKENS // length)
    drawn = [np.concatenate([step(prompts[at : at + together], at, 0) for at in range(0, len(prompts), together)])]
    for past in range(length, length + new - 1):
        drawn.append(step(drawn[-1][:, None].tolist(), 0, past))
    return np.stack(drawn, 1)


def main() -> None:
    folder, dtype = sys.argv[1:]
    spec = read_model(Path(folder), "model")
    registration, _ = select(spec, "openvino")
    model = registration.create(spec, DeviceConfig(dtype=DType(dtype)))
    serve(lambda work, new: generate(model, work, new))


if __name__ == "__main__":
    main()
