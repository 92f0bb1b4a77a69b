"""What is different in two answers to one request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from penstock.client import Choice, Result, TokenLogprob

__all__ = ["Measure", "differences"]


@dataclass(slots=True)
class Measure:
    """How answers are compared, and what was found.

    Attributes:
        tolerance: by how much log-probabilities may differ; 0 asks for the same bits.
        cached_tokens: whether both clusters are to find the same in their prefix caches.
        rounded: whether tokens may differ; what stands behind the first other one is then of another past, and not compared.
        logprobs: pairs of log-probabilities that were compared.
        largest: difference of them that was seen.
        total: of all these differences.
        alike: output tokens that are the same, in each answer up to its first other one.
    """

    tolerance: float
    cached_tokens: bool
    rounded: bool = False
    logprobs: int = 0
    largest: float = 0.0
    total: float = 0.0
    alike: int = 0

    def same(self, one: float, other: float) -> bool:
        """Whether two log-probabilities are near enough."""
        self.logprobs += 1
        if one == other:
            return True
        apart = abs(one - other)
        self.largest = max(self.largest, apart)
        self.total += apart
        return apart <= self.tolerance  # nan is not


def differences(together: Result, apart: Result, measure: Measure) -> Iterator[str]:
    """What is different, each in a few words: the answer of the cluster that runs together stands first."""
    if len(together.choices) != len(apart.choices):
        yield f"choices: {len(together.choices)} and {len(apart.choices)}"
    for one, other in zip(together.choices, apart.choices, strict=False):
        where = f"choice {one.index}: " if len(together.choices) > 1 else ""
        yield from (f"{where}{what}" for what in _of_choices(one, other, measure))
    yield from _of_usages(together, apart, measure)


def _of_usages(together: Result, apart: Result, measure: Measure) -> Iterator[str]:
    drawn = () if measure.rounded else ("completion_tokens",)
    for field in ("prompt_tokens", *drawn, *(("cached_tokens",) if measure.cached_tokens else ())):
        one, other = getattr(together.usage, field), getattr(apart.usage, field)
        if one != other:
            yield f"usage.{field}: {one} and {other}"


def _of_choices(one: Choice, other: Choice, measure: Measure) -> Iterator[str]:
    measure.alike += _common(one.token_ids, other.token_ids)
    parted = one.token_ids != other.token_ids
    if not (parted and measure.rounded):
        if parted:
            yield f"tokens: {_first_difference(one.token_ids, other.token_ids)}"
        elif one.text != other.text:
            yield f"text: {one.text!r} and {other.text!r}"
        if one.finish != other.finish:
            yield f"finish: {one.finish} and {other.finish}"
    yield from _of_logprobs("logprobs", one.logprobs, other.logprobs, measure)
    yield from _of_logprobs("prompt_logprobs", one.prompt_logprobs, other.prompt_logprobs, measure)


def _common(one: Sequence[object], other: Sequence[object]) -> int:
    """How many of the first are the same."""
    pairs = zip(one, other, strict=False)
    return next((index for index, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


def _first_difference(one: Sequence[object], other: Sequence[object]) -> str:
    index = _common(one, other)
    if index < min(len(one), len(other)):
        return f"{one[index]} and {other[index]} at {index}"
    return f"{len(one)} and {len(other)} of them"


def _of_logprobs(name: str, one: Sequence[TokenLogprob], other: Sequence[TokenLogprob], measure: Measure) -> Iterator[str]:
    """All that can be compared is measured, and the first fault told: there may be thousands."""
    ids, others = [place.token_id for place in one], [place.token_id for place in other]
    # That of the first other token as well: what it was drawn from stands behind the same past.
    places = list(zip(one, other, strict=False))[: _common(ids, others) + 1]
    found = [f"{name} at {index}: {what}" for index, pair in enumerate(places) for what in _of_places(*pair, measure)]
    if ids != others and (not measure.rounded or not places):
        yield f"{name}: {_first_difference(ids, others)}"
    else:
        yield from found[:1]


def _of_places(one: TokenLogprob, other: TokenLogprob, measure: Measure) -> Iterator[str]:
    exactly = measure.tolerance == 0
    if one.token_id == other.token_id:
        if not measure.same(one.logprob, other.logprob):
            yield f"{one.logprob!r} and {other.logprob!r}"
        if exactly and (one.rank, one.token) != (other.rank, other.token):
            yield f"rank {one.rank} and {other.rank}"
    if len(one.alternatives) != len(other.alternatives):
        yield f"{len(one.alternatives)} and {len(other.alternatives)} alternatives"
    for place, (left, right) in enumerate(zip(one.alternatives, other.alternatives, strict=False)):
        # Two that are as likely as each other within the tolerance may have changed places.
        if not measure.same(left.logprob, right.logprob) or (exactly and left.token_id != right.token_id):
            yield f"alternative {place}: {left.token_id} at {left.logprob!r} and {right.token_id} at {right.logprob!r}"
