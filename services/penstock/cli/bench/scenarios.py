"""The work that is timed: n requests submitted together, or a Poisson stream of them, over random token ids."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["SCENARIOS", "Poisson", "Request", "Scenario", "named", "prompts", "warm_up"]

# Ids below are special tokens in many vocabularies; those above are in every vocabulary of the models that are compared.
_FIRST_ID, _PAST_LAST_ID = 100, 15_000


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, the exact number of tokens that it is continued by, and when it is sent, in seconds from the start."""

    prompt: list[int]
    new_tokens: int
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """Requests that are submitted together; it ends when the last has finished. Greedy, end-of-sequence ignored."""

    name: str
    requests: int
    prompt_tokens: int
    new_tokens: int

    def work(self, seed: int, vocabulary: int) -> list[Request]:
        """The requests, with prompts of this seed."""
        return [Request(p, self.new_tokens) for p in prompts(self.requests, self.prompt_tokens, seed, vocabulary)]


SCENARIOS = (
    Scenario("prefill-512", 1, 512, 1),
    Scenario("decode-b1", 1, 16, 65),
    Scenario("decode-b8", 8, 16, 65),
    Scenario("decode-b32", 32, 16, 65),
    Scenario("mixed-b16", 16, 256, 64),
)


@dataclass(frozen=True, slots=True)
class Poisson:
    """An open loop: requests come at random, `rate` a second on average for `duration` seconds, however long answers take.

    Lengths are drawn evenly from ``mean * (1 - spread)`` to ``mean * (1 + spread)``.
    """

    rate: float
    duration: float
    prompt_tokens: int
    new_tokens: int
    spread: float

    def work(self, seed: int, vocabulary: int) -> list[Request]:
        """The requests by time of arrival; the same for the same seed."""
        rng = random.Random(seed)  # noqa: S311 - a load, not a secret
        requests: list[Request] = []
        at = rng.expovariate(self.rate)
        while at < self.duration:
            prompt = _prompt(rng, self._length(rng, self.prompt_tokens), vocabulary)
            requests.append(Request(prompt, self._length(rng, self.new_tokens), at))
            at += rng.expovariate(self.rate)
        return requests

    def _length(self, rng: random.Random, mean: int) -> int:
        return max(1, round(mean * rng.uniform(1 - self.spread, 1 + self.spread)))


def named(names: Sequence[str]) -> list[Scenario]:
    """The scenarios of these names, in the order of `SCENARIOS`; all for no names.

    Raises:
        ValueError: there is none of that name; says which there are.
    """
    known = [scenario.name for scenario in SCENARIOS]
    for name in names:
        if name not in known:
            raise ValueError(f"--scenario: no {name!r}; there are {', '.join(known)}")
    return [scenario for scenario in SCENARIOS if not names or scenario.name in names]


def prompts(n: int, length: int, seed: int, vocabulary: int) -> list[list[int]]:
    """Prompts of `length` random ids each: the same ids for every vocabulary of 15,000 or more, and ids within a smaller one."""
    rng = random.Random(seed)  # noqa: S311 - the same
    return [_prompt(rng, length, vocabulary) for _ in range(n)]


def warm_up(vocabulary: int) -> list[Request]:
    """What is run once before anything is timed."""
    return [Request(prompts(1, 32, 1, vocabulary)[0], 4)]


def _prompt(rng: random.Random, length: int, vocabulary: int) -> list[int]:
    first = _FIRST_ID if vocabulary > _FIRST_ID else 0
    return [rng.randrange(first, min(_PAST_LAST_ID, vocabulary)) for _ in range(length)]
