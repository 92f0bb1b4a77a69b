"""What an engine's steps cost: curves that were measured once, and the seconds of any step by them.

Two laws carry the curves to lengths that were not measured. In prefill, attention adds the same time for each pair of a new token
and a token that stands before it (its products are as many as the pairs). In decoding, it adds the same time for each token that
stands in the cache (each is read once). All else depends on how many tokens a step computes, along a curve through the measured
knots: exact at them, straight between them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Curve", "StepTimes"]


@dataclass(frozen=True, slots=True)
class Curve:
    """Seconds over a size that rises from knot to knot; the seconds never fall.

    Below the first knot a step takes as long as there. Beyond the last one the curve goes on as it came; where there is one knot
    alone, time is proportional to size.

    Raises:
        ValueError: the knots are none, do not rise, or have times that no step takes.
    """

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes, seconds = self.sizes, self.seconds
        if not sizes or len(sizes) != len(seconds):
            raise ValueError(f"{len(sizes)} sizes and {len(seconds)} times make no curve")
        if sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"sizes must rise from 1 or more, not be {sizes}")
        if not (seconds[0] > 0 and seconds[-1] < math.inf) or any(not a <= b for a, b in pairwise(seconds)):
            raise ValueError(f"seconds must be positive, finite and never fall, not be {seconds}")

    @classmethod
    def through(cls, measured: Mapping[int, float]) -> Curve:
        """The curve of measured times. What disturbs a measurement makes it longer: a time above a larger size's comes down to it.

        Raises:
            ValueError: as for a curve.
        """
        sizes = sorted(measured)
        seconds: list[float] = []
        least = math.inf
        for size in reversed(sizes):
            least = min(least, measured[size])
            seconds.append(least)
        return cls(tuple(sizes), tuple(reversed(seconds)))

    def at(self, size: float) -> float:
        """Seconds of a size."""
        sizes, seconds = self.sizes, self.seconds
        if size <= sizes[0]:
            return seconds[0]
        if len(sizes) == 1:
            return seconds[0] * size / sizes[0]
        right = min(bisect_left(sizes, size), len(sizes) - 1)
        if sizes[right] == size:
            return seconds[right]
        slope = (seconds[right] - seconds[right - 1]) / (sizes[right] - sizes[right - 1])
        return max(seconds[right - 1], seconds[right] - slope * (sizes[right] - size))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of an engine's steps.

    Attributes:
        prefill: by prompt tokens of a step, behind nothing.
        prefill_pair_seconds: what each pair of a new token and one that stands before the step adds.
        decode: by sequences that decode, each with `decode_context` tokens.
        decode_context: tokens of a sequence on the curve of decoding.
        decode_token_seconds: what each token of context beyond these adds, of each sequence.

    Raises:
        ValueError: one of them is not possible.
    """

    prefill: Curve
    prefill_pair_seconds: float
    decode: Curve
    decode_context: int
    decode_token_seconds: float

    def __post_init__(self) -> None:
        for name in ("prefill_pair_seconds", "decode_token_seconds"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, not {value}")
        if self.decode_context < 1:
            raise ValueError(f"decode_context must be at least 1, not {self.decode_context}")

    @property
    def prefill_tokens_per_second(self) -> float:
        """Of prompts behind nothing, at the best chunk that was measured."""
        return max(size / seconds for size, seconds in zip(self.prefill.sizes, self.prefill.seconds, strict=True))

    def chunk_seconds(self, tokens: int, past: int = 0) -> float:
        """Seconds of one step that computes so many prompt tokens behind `past` others of their sequence."""
        return self.prefill.at(tokens) + self.prefill_pair_seconds * tokens * past

    def prefill_seconds(self, tokens: int, past: int = 0) -> float:
        """Seconds that so many tokens of a prompt take behind `past` others, in chunks of the largest measured size."""
        chunk = self.prefill.sizes[-1]
        whole, rest = divmod(max(tokens, 0), chunk)
        behind = whole * past + chunk * (whole * (whole - 1) // 2)
        seconds = whole * self.prefill.seconds[-1] + self.prefill_pair_seconds * chunk * behind
        return seconds + (self.chunk_seconds(rest, past + whole * chunk) if rest else 0.0)

    def most_seconds(self, prompt_tokens: int, batch: int, context: int) -> float:
        """Seconds of a step of so many prompt tokens beside `batch` decoding sequences, if each stands behind `context` tokens."""
        prefill = self.chunk_seconds(prompt_tokens, context) if prompt_tokens else 0.0
        return prefill + (self.step_seconds(batch, context) if batch else 0.0)

    def step_seconds(self, batch: int, context: float) -> float:
        """Seconds of a step in which `batch` sequences decode, each with `context` tokens on average."""
        beyond = max(0.0, context - self.decode_context)
        return self.decode.at(batch) + self.decode_token_seconds * batch * beyond
