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
        largest: difference of log-probabilities that was seen.
    """

    tolerance: float
    cached_tokens: bool
    largest: float = 0.0

    def same(self, one: float, other: float) -> bool:
        """Whether two log-probabilities are near enough."""
        if one == other:
            return True
        apart = abs(one - other)
        self.largest = max(self.largest, apart)
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
    fields = ("prompt_tokens", "completion_tokens", *(("cached_tokens",) if measure.cached_tokens else ()))
    for field in fields:
        one, other = getattr(together.usage, field), getattr(apart.usage, field)
        if one != other:
            yield f"usage.{field}: {one} and {other}"


def _of_choices(one: Choice, other: Choice, measure: Measure) -> Iterator[str]:
    if one.token_ids != other.token_ids:
        yield f"tokens: {_first_difference(one.token_ids, other.token_ids)}"
    elif one.text != other.text:
        yield f"text: {one.text!r} and {other.text!r}"
    if one.finish != other.finish:
        yield f"finish: {one.finish} and {other.finish}"
    yield from _of_logprobs("logprobs", one.logprobs, other.logprobs, measure)
    yield from _of_logprobs("prompt_logprobs", one.prompt_logprobs, other.prompt_logprobs, measure)


def _first_difference(one: Sequence[object], other: Sequence[object]) -> str:
    for index, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return f"{left} and {right} at {index}"
    return f"{len(one)} and {len(other)} of them"


def _of_logprobs(name: str, one: Sequence[TokenLogprob], other: Sequence[TokenLogprob], measure: Measure) -> Iterator[str]:
    if [told.token_id for told in one] != [told.token_id for told in other]:
        yield f"{name}: {_first_difference([told.token_id for told in one], [told.token_id for told in other])}"
        return
    for index, (left, right) in enumerate(zip(one, other, strict=True)):
        what = _of_places(left, right, measure)
        if what:
            yield f"{name} at {index}: {what}"
            return  # the first tells enough: there may be thousands


def _of_places(one: TokenLogprob, other: TokenLogprob, measure: Measure) -> str:
    if not measure.same(one.logprob, other.logprob):
        return f"{one.logprob!r} and {other.logprob!r}"
    exactly = measure.tolerance == 0
    if exactly and (one.rank, one.token) != (other.rank, other.token):
        return f"rank {one.rank} and {other.rank}"
    if len(one.alternatives) != len(other.alternatives):
        return f"{len(one.alternatives)} and {len(other.alternatives)} alternatives"
    for place, (left, right) in enumerate(zip(one.alternatives, other.alternatives, strict=True)):
        # Two that are as likely as each other within the tolerance may have changed places.
        if (exactly and left.token_id != right.token_id) or not measure.same(left.logprob, right.logprob):
            return f"alternative {place}: {left.token_id} at {left.logprob!r} and {right.token_id} at {right.logprob!r}"
    return ""
