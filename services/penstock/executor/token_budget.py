"""How many tokens a step should hold, by how long its steps take: pure functions.

While sequences decode, a chunk of another's prompt in the same step makes them wait for it. The chunk is the largest that keeps
such a step within a target. Without a target of the operator's that is `TARGET_STEPS` times a step of decoding with a full batch,
the strict objective of Sarathi-Serve (Agrawal et al., 2024). Yet the smaller the chunk, the more often all weights are read for
it: without a target of the operator's, the chunk keeps `LEAST_RATE` of the speed of prefill, even if that takes longer.

While none decodes, nobody waits for the step but those whose prompts are in it and those who come. It holds no more than keeps the
device busy: the least with `FULL_RATE` of the speed.
"""

from __future__ import annotations

from dataclasses import dataclass

from penstock.common.step_times import StepTimes

__all__ = ["TokenBudget", "fit"]

TARGET_STEPS = 5
LEAST_RATE = 0.8
FULL_RATE = 0.97
# Contexts of sequences differ, and the target is set before there are any.
_CONTEXT = 1024
_GRAIN = 16


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """What a step holds at most.

    Attributes:
        prefill_chunk: prompt tokens, where others decode.
        max_batch_tokens: tokens.
    """

    prefill_chunk: int
    max_batch_tokens: int


def fit(times: StepTimes, most: TokenBudget, max_batch_size: int, target_seconds: float | None = None) -> TokenBudget:
    """The budget that step times ask for.

    Args:
        times: as measured.
        most: what the model was made for; neither number is passed.
        max_batch_size: sequences that run at a time; a step has to hold more tokens than that.
        target_seconds: of a step with prompt tokens in it while others decode; None: by the module's rule.
    """
    sizes = range(_GRAIN, most.max_batch_tokens + 1, _GRAIN) or range(most.max_batch_tokens, most.max_batch_tokens + 1)
    target = TARGET_STEPS * times.step_seconds(max_batch_size, _CONTEXT) if target_seconds is None else target_seconds
    within = max((n for n in sizes if times.chunk_seconds(n) <= target), default=sizes[0])
    least = _least(times, sizes, LEAST_RATE) if target_seconds is None else 0
    chunk = min(max(within, least), most.prefill_chunk)
    # A step of decodes alone needs a token for each, and has room for a chunk beside them.
    whole = max(_least(times, sizes, FULL_RATE), chunk + max_batch_size)
    return TokenBudget(chunk, min(whole, most.max_batch_tokens))


def _least(times: StepTimes, sizes: range, share: float) -> int:
    """The least chunk whose speed is this share of the best one's."""
    enough = share * times.prefill_tokens_per_second
    return next((n for n in sizes if n / times.chunk_seconds(n) >= enough), sizes[-1])
