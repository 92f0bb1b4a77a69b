"""Steps of a number of tokens that products with short weights are quick for.

A processor without bfloat16 widens all but float32 ones as it multiplies, in oneDNN's kernels. Those cut the rows of a step into
blocks of one size, and take small ones where the number of rows has no better divisor: 497 tokens, seven times 71, take twice as
long as 512. Some tokens more, of a sequence that nobody asked for, make a number that divides well.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from penstock.backends.contract import StepBatch

__all__ = ["LONGEST", "pad", "quick_count"]

# Up to so many tokens, a multiple of what: measured with AVX2, see docs/benchmarks.md.
_MULTIPLES = ((64, 1), (256, 8), (1024, 16))
LONGEST = 32
"""More tokens than any step is padded with: the multiple for all longer ones."""


def quick_count(tokens: int) -> int:
    """The least number from `tokens` on that divides well."""
    multiple = next((multiple for most, multiple in _MULTIPLES if tokens <= most), LONGEST)
    return -(-tokens // multiple) * multiple


def pad(batch: StepBatch, block: int) -> StepBatch:
    """The step with one sequence more, in a block that is nobody's, that brings its tokens to a quick number.

    Args:
        batch: the step.
        block: of at least `LONGEST` tokens; what stands in it is lost.
    """
    tokens = len(batch.token_ids)
    more = quick_count(tokens) - tokens
    if not more:
        return batch
    return replace(
        batch,
        token_ids=np.append(batch.token_ids, np.zeros(more, np.int64)),
        positions=np.append(batch.positions, np.arange(more, dtype=np.int64)),
        past_lengths=np.append(batch.past_lengths, np.int32(0)),
        starts=np.append(batch.starts, np.int32(tokens + more)),
        block_ids=np.append(batch.block_ids, np.int32(block)),
        block_starts=np.append(batch.block_starts, np.int32(len(batch.block_ids) + 1)),
    )
