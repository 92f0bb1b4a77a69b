"""Whether a request's prefill should run on an executor of its own: pure functions over calibrated costs, in seconds.

What counts is the waiting that each way costs everyone, the request itself included. Running together on the executor *d*:

    first token = ahead + prefill(uncached) + steps * step(running)
    cost        = first token + 2 * running * prefill(uncached) + answer

Chunks of prefill share their steps with the sequences that decode there: each of the *steps* takes their decoding along, and each
of the *running* sequences gets its next tokens later by all of this prompt's prefill. *ahead* is what already waits for prefill.
Running apart, on *p* and then on *d*:

    first token = round trip + step(running) + ahead of p + prefill(uncached on p)
    cost        = first token + exposed + 2 * running * (transfer + taking) + answer

Here *d* answers with a ticket within a step; KV moves while prefill runs, so that only the last chunk's part of the transfer, or
what is longer than all of prefill, is *exposed* before *d* goes on; *taking* KV in holds up those that decode there. *answer* is
the time that the answer's own steps take on *d*, so that a choice between two executors sees their load. A wait in the middle of an
answer counts twice as much as one before it begins, since limits on the time between tokens are the tighter ones: counted once, a
prefill pool under more load than it can bear spills so much that those who decode are worse off than if all were split
(`benchmarks/splitting.py`).

The cheaper way is taken, and together where they are equal. Where a deadline is left that one of them is expected to miss with the
first token, the other one is taken. A link that needs longer for a token than *d* needs to compute it is not used at all. Hence
more of the prompt in *d*'s cache never moves a request to an executor of its own, and neither does a slower link.

That long prompts disturb those who decode, and that this is what prefill on hardware of its own is for, is DistServe's finding
(Zhong and others, 2024); that one decides per request, by the prompt's uncached length and the prefill queue, is the conditional
disaggregation of NVIDIA's Dynamo. Both work with thresholds that an operator finds; here measured costs stand in their place.

Prefill is taken as proportional to its tokens, at the executor's best measured rate, with the attention to what stands before them
added (`penstock.common.step_times`). Where an executor has not measured itself, tokens are counted: each takes the same time to
prefill, a tenth of it to hand over, and as long in a step of decoding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from penstock.common.step_times import StepTimes

__all__ = ["COUNTED", "COUNTED_LINK", "Decoding", "Estimate", "Pace", "apart", "link_seconds", "splits", "together"]

# To the decode executor and back, and on to the one that prefills, through their loops; about what it takes on one machine.
_ROUND_TRIP_SECONDS = 0.005
# Of work between two steps for whatever KV comes.
_TAKING_SECONDS = 0.001
# Of seconds by which those that decode get their next token later.
_HARM = 2.0
# KV from memory to memory of one machine, or over a quick network, until it was measured; and of a model of a few billion
# parameters, until it is known.
_BYTES_PER_SECOND = 1e9
_BYTES_PER_TOKEN = 128 << 10
_COUNTED_SECONDS = 1e-3
_COUNTED_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Pace:
    """How quick an executor is.

    Attributes:
        token_seconds: of a prompt's token, at the best rate.
        pair_seconds: what each pair of a new token and one that stands before its chunk adds.
        chunk: tokens of a prompt in one step beside others that decode.
        best_chunk: tokens of the step at which the best rate was measured.
        times: of its steps; None where tokens are counted.
    """

    token_seconds: float
    pair_seconds: float
    chunk: int
    best_chunk: int
    times: StepTimes | None

    @classmethod
    def of(cls, times: StepTimes, prefill_chunk: int) -> Pace:
        """As an executor has measured itself."""
        curve = times.prefill
        seconds, size = min((s / n, n) for n, s in zip(curve.sizes, curve.seconds, strict=True))
        return cls(seconds, times.prefill_pair_seconds, prefill_chunk or curve.sizes[-1], size, times)

    @property
    def least_token_seconds(self) -> float:
        """What one token more costs at least: attention within a chunk is a part of the rate, and less in a short one."""
        return self.token_seconds - self.pair_seconds * self.best_chunk / 2

    def prefill(self, tokens: int, past: int) -> float:
        """Seconds of so many tokens behind `past` others."""
        before = past + max(0, tokens - self.best_chunk) / 2
        return tokens * (self.token_seconds + self.pair_seconds * before)

    def step(self, running: int, context: float) -> float:
        """Seconds of a step in which so many sequences decode, each with so many tokens on average; none take no time."""
        if not running:
            return 0.0
        return _COUNTED_SECONDS * running if self.times is None else self.times.step_seconds(running, context)


# Where tokens are counted.
COUNTED = Pace(_COUNTED_SECONDS, 0.0, _COUNTED_CHUNK, _COUNTED_CHUNK, None)
COUNTED_LINK = 0.1 * _COUNTED_SECONDS


def link_seconds(bytes_per_token: int, bytes_per_second: float) -> float:
    """Seconds that a token's KV takes from one executor to another, as measured; a number that is not known is 0."""
    return (bytes_per_token or _BYTES_PER_TOKEN) / (bytes_per_second or _BYTES_PER_SECOND)


# Not frozen: that would cost a tenth of a placement.
@dataclass(slots=True)
class Decoding:
    """An executor on which a request may decode.

    Attributes:
        pace: how quick it is.
        ahead: prompt tokens that wait for prefill there.
        running: sequences that are there, but for those that wait for KV.
        step: seconds of a step in which these decode.
        answer: seconds of all steps of the request's own answer.
        cached: tokens of the request's prompt in its prefix cache.
    """

    pace: Pace
    ahead: int
    running: int
    step: float
    answer: float
    cached: int


@dataclass(slots=True)
class Estimate:
    """Seconds to a request's first token, and of waiting that it costs everyone."""

    first_token: float
    cost: float


def together(prompt: int, decoding: Decoding) -> Estimate:
    """All of a request, with a prompt of so many tokens, on one executor."""
    pace, uncached = decoding.pace, prompt - decoding.cached
    own = pace.prefill(uncached, decoding.cached)
    steps = (decoding.ahead + uncached) / pace.chunk
    first = decoding.ahead * pace.token_seconds + own + steps * decoding.step
    return Estimate(first, first + _HARM * decoding.running * own + decoding.answer)


def apart(prompt: int, prefilling: float, decoding: Decoding, link: float) -> Estimate:
    """Prefill on an executor of its own.

    Args:
        prompt: the prompt's tokens.
        prefilling: seconds of the prefill there, what is ahead of it included.
        decoding: the executor that takes the KV over.
        link: seconds that a token's KV takes between the two.
    """
    pace, moved = decoding.pace, prompt - decoding.cached
    if link >= pace.least_token_seconds:
        return Estimate(math.inf, math.inf)
    transfer = moved * link
    exposed = max(min(moved, pace.best_chunk) * link, transfer - prefilling)
    first = _ROUND_TRIP_SECONDS + decoding.step + prefilling
    return Estimate(first, first + exposed + _HARM * decoding.running * (transfer + _TAKING_SECONDS) + decoding.answer)


def splits(whole: Estimate, split: Estimate, left: float | None) -> bool:
    """Whether a request is to run apart; `left` are the seconds to its deadline."""
    if left is not None and (whole.first_token > left) != (split.first_token > left):
        return whole.first_token > left
    return split.cost < whole.cost
