"""Which executors can run a request, and which of them should: pure functions.

The cost of an executor for a request, in tokens, the least being chosen:

    cost = prefill_slowness * prefill_weight * (uncached + waiting + fresh) + decode_slowness * leased

where *uncached* is the part of the request's prompt that is not expected in the executor's prefix cache, *waiting* the prompt
tokens that the executor reported as waiting for prefill, *fresh* those leased since that report, and *leased* all tokens that the
scheduler holds against the executor. The first three delay this request's first token, the last slows every step of its decoding;
the shape is that of NVIDIA Dynamo's KV router (overlap weight times prefill blocks, plus decode blocks). *prefill_slowness* is the
model's highest prefill rate over the executor's own, as reported or, until it has prefilled, as calibrated; 1 where unknown.
*decode_slowness* is the calibrated time of a common step of decoding over that of the model's quickest executor; where the executor
has none, its prefill_slowness. Equal costs go to the executor with fewer sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.scheduler.executors import Executor
from penstock.scheduler.model import Needs

__all__ = ["Capable", "Unsupported", "cached_tokens", "capable", "choose", "cost", "fitting"]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """No executor can run it: the public field that stands in the way, and a sentence for the client."""

    field: str
    message: str


@dataclass(frozen=True, slots=True)
class Capable:
    """Executors that support all of a request's fields; `least` tokens of a sequence fit every one of them."""

    executors: tuple[Executor, ...]
    least: int


def capable(model: str, fingerprint: str, fields: Sequence[str], executors: Sequence[Executor]) -> Capable | Unsupported:
    """The executors with the same tokenizer that support every field. None have the tokenizer: none are capable."""
    left = [e for e in executors if e.description.tokenizer_fingerprint == fingerprint]
    had = bool(left)
    for field in fields:
        supporting = [e for e in left if field in e.description.fields]
        if had and not supporting:
            return Unsupported(field, _unsupported(model, field, left, executors))
        left = supporting
    return Capable(tuple(left), min((e.sequence_tokens for e in left), default=0))


def _unsupported(model: str, field: str, left: Sequence[Executor], executors: Sequence[Executor]) -> str:
    if any(field in e.description.fields for e in executors):
        return f"no executor of model {model!r} supports {field} together with the request's other fields; leave one of them out"
    backends = len(left)
    return f"none of the {backends} executor(s) of model {model!r} supports {field}; leave it out, or run one that does"


def fitting(needs: Needs, found: Capable) -> tuple[Executor, ...] | Unsupported:
    """Those of the capable executors that can hold one of the request's sequences, without those to avoid unless all are."""
    executors = found.executors
    total = needs.prompt_tokens + needs.max_tokens
    if total > found.least and executors:
        executors = tuple(e for e in executors if e.sequence_tokens >= total)
        if not executors:
            return _too_long(needs, max(e.sequence_tokens for e in found.executors))
    if needs.avoid:
        executors = tuple(e for e in executors if e.description.executor_id not in needs.avoid) or executors
    return executors


def _too_long(needs: Needs, most: int) -> Unsupported:
    if needs.prompt_tokens >= most:
        return Unsupported("prompt", f"the prompt has {needs.prompt_tokens} tokens, and executors hold {most} with the answer")
    fit = most - needs.prompt_tokens
    return Unsupported(
        "stopping.max_tokens", f"{needs.max_tokens} is too many: {fit} fit behind the prompt's {needs.prompt_tokens}"
    )


def cached_tokens(executor: Executor, depths: Mapping[int, int], prompt_tokens: int) -> int:
    """Prompt tokens expected in the executor's cache. The last one is always computed: the answer begins from it."""
    return min(depths.get(executor.bit, 0) * executor.description.kv_block_size, prompt_tokens - 1)


def cost(executor: Executor, uncached: int, prefill_weight: float) -> float:
    """The module's formula."""
    prefill = uncached + executor.load.waiting_tokens + executor.fresh_tokens
    return executor.prefill_slowness * prefill_weight * prefill + executor.decode_slowness * executor.hold.tokens


def choose(
    prompt_tokens: int, open_executors: Sequence[Executor], depths: Mapping[int, int], prefill_weight: float
) -> tuple[Executor, int]:
    """The cheapest of the executors that have room, at least one, and the prompt tokens expected in its cache."""
    best, best_cached, best_key = open_executors[0], 0, (math.inf, 0)
    for executor in open_executors:
        cached = cached_tokens(executor, depths, prompt_tokens) if depths else 0
        key = (cost(executor, prompt_tokens - cached, prefill_weight), executor.hold.sequences + executor.foreign)
        if key < best_key:
            best, best_cached, best_key = executor, cached, key
    return best, best_cached
