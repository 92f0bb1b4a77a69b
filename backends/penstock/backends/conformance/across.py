"""Checks of two backends with one checkpoint: they answer alike, and KV that one computed serves the other.

In float32 both must choose the same greedy tokens. In shorter types the logits of one may be off from the other's by what both may
be off from the formulas, taken together, and choices must agree where one token leads by more than that may take away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from penstock.backends.conformance.driver import Driver, SequenceState
from penstock.backends.conformance.subject import NotApplicable, Subject, assert_close, assert_same_choices, assert_same_kv, require
from penstock.backends.contract import DType, GenerativeModel
from penstock.backends.kv_abilities import native_kv

__all__ = ["PAIR_CHECKS", "Pair"]

_ANSWER = 24


@dataclass(frozen=True, slots=True)
class Pair:
    """Two backends with the same checkpoint; KV goes from the first to the second."""

    source: Subject
    target: Subject

    @property
    def tolerance(self) -> float:
        """What the two may differ by: what each may be off from the formulas."""
        return self.source.tolerance + self.target.tolerance

    def check_applies(self) -> None:
        """Raise NotApplicable where one of them makes its answers up."""
        for subject in (self.source, self.target):
            if not subject.computes:
                raise NotApplicable(f"{subject.registration.name} makes its answers up")


def greedy_answers_are_the_same(pair: Pair) -> None:
    """Prompts of many lengths are continued with the same greedy tokens by both."""
    pair.check_applies()
    with ExitStack() as stack:
        first, second = (stack.enter_context(subject.model()) for subject in (pair.source, pair.target))
        for seed, length in enumerate((1, 2, 15, 16, 17, 33, 64, 100)):
            prompt = pair.source.ids(length, seed)
            leading, following = pair.source.driver(first), pair.target.driver(second)
            sequence, logits = leading.prefill(prompt)
            answer, right = leading.greedy(sequence, int(logits[-1].argmax()), _ANSWER)
            sequence, begun = following.prefill(prompt)
            found = np.concatenate((begun[-1:], following.follow(sequence, answer)))
            _assert_alike(pair, found, np.concatenate((logits[-1:], right)), f"a prompt of {length} tokens")


def kv_serves_the_other(pair: Pair) -> None:
    """A sequence goes on in the second with KV of the first, in pieces that fit neither's blocks, with the first one's tokens."""
    _moves(pair)
    with ExitStack() as stack:
        first, second = (stack.enter_context(subject.model()) for subject in (pair.source, pair.target))
        away, here = pair.source.driver(first), pair.target.driver(second, list(reversed(range(second.kv.blocks))))
        prompt = pair.source.ids(75, 3)
        sequence, logits = away.prefill(prompt)
        moved = _move((first, sequence), (second, here), (0, 13, 32, 49, 75))
        answer, right = away.greedy(sequence, int(logits[-1].argmax()), _ANSWER)
        _assert_alike(pair, here.follow(moved, answer), right, "behind the other's KV")


def kv_serves_the_other_while_it_decodes(pair: Pair) -> None:
    """KV that comes into blocks beside running sequences disturbs none of them, and goes back as it came."""
    _moves(pair)
    with ExitStack() as stack:
        first, second = (stack.enter_context(subject.model()) for subject in (pair.source, pair.target))
        away, here = pair.source.driver(first), pair.target.driver(second)
        running, _ = here.prefill(pair.target.ids(37, 1))
        answer = pair.target.ids(9, 2)
        sequence, _ = away.prefill(pair.source.ids(50, 3))
        before = here.follow(running, answer[:4])
        moved = _move((first, sequence), (second, here), (0, 21, 50))
        found = np.concatenate((before, here.follow(running, answer[4:])))
        alone, _ = here.prefill(pair.target.ids(37, 1))
        pair.target.assert_close(found, here.follow(alone, answer), "a sequence that ran beside an import")
        sent, back = (model.export_kv(s.blocks, range(50)).data for model, s in ((first, sequence), (second, moved)))
        assert_same_kv(back, sent, "that went in and came out")


def kv_arrives_as_it_was(pair: Pair) -> None:
    """The second holds the first one's values: the same bits where its type has them, else the nearest that it has."""
    _moves(pair)
    with ExitStack() as stack:
        first, second = (stack.enter_context(subject.model()) for subject in (pair.source, pair.target))
        away, here = pair.source.driver(first), pair.target.driver(second)
        sequence, _ = away.prefill(pair.source.ids(50, 3))
        moved = _move((first, sequence), (second, here), (0, 9, 50))
        sent, found = (model.export_kv(s.blocks, range(50)).data for model, s in ((first, sequence), (second, moved)))
        if pair.target.kv_dtype is None:
            require(np.array_equal(found, sent.astype(found.dtype)), "KV is not what was sent, nor the nearest to it")
        else:
            assert_same_kv(found, sent, "that came over")


def answers_are_the_same_apart(pair: Pair) -> None:
    """In float32, what the first would answer is what the second answers behind the first one's KV and first token, id for id."""
    _moves(pair)
    for subject in (pair.source, pair.target):
        if subject.dtype is not DType.F32 or subject.kv_dtype is not None:
            raise NotApplicable(f"{subject.registration.name} rounds more than float32 does")
    with ExitStack() as stack:
        first, second = (stack.enter_context(subject.model()) for subject in (pair.source, pair.target))
        away, here = pair.source.driver(first), pair.target.driver(second)
        for seed, length in enumerate((1, 47)):
            sequence, logits = away.prefill(pair.source.ids(length, seed))
            moved = _move((first, sequence), (second, here), (0, length))
            begin = int(logits[-1].argmax())
            right, found = (driver.greedy(s, begin, _ANSWER)[0] for driver, s in ((away, sequence), (here, moved)))
            require(found == right, f"behind {length} tokens the second answers {found}, the first {right}")


def blocks_serve_the_other(pair: Pair) -> None:
    """Where both call their native form the same, blocks of the first are the second's KV, to the bit."""
    _moves(pair)
    with ExitStack() as stack:
        first, second = (stack.enter_context(subject.model()) for subject in (pair.source, pair.target))
        giver, taker = native_kv(first), native_kv(second)
        if giver is None or taker is None or first.kv.native_layout != second.kv.native_layout:
            raise NotApplicable("their native forms have other names")
        away, here = pair.source.driver(first), pair.target.driver(second, list(reversed(range(second.kv.blocks))))
        sequence, _ = away.prefill(pair.source.ids(50, 3))
        moved = here.sequence()
        here.extend(moved, 50)
        taker.import_blocks(moved.blocks, giver.export_blocks(sequence.blocks))
        places: tuple[tuple[GenerativeModel, SequenceState], ...] = ((first, sequence), (second, moved))
        sent, found = (model.export_kv(s.blocks, range(50)).data for model, s in places)
        require(sent.tobytes() == found.tobytes(), "blocks of the first are other KV in the second")


def _move(
    source: tuple[GenerativeModel, SequenceState], target: tuple[GenerativeModel, Driver], bounds: Sequence[int]
) -> SequenceState:
    """A sequence in the target with the source's KV, handed over in pieces that end at these positions."""
    (giver, sequence), (taker, driver) = source, target
    moved = driver.sequence()
    driver.extend(moved, bounds[-1])
    for start, stop in pairwise(bounds):
        taker.import_kv(moved.blocks, giver.export_kv(sequence.blocks, range(start, stop)))
    moved.length = bounds[-1]
    return moved


def _moves(pair: Pair) -> None:
    pair.check_applies()
    if not pair.source.capabilities.export_kv:
        raise NotApplicable(f"{pair.source.registration.name} exports no KV")
    if not pair.target.capabilities.import_kv:
        raise NotApplicable(f"{pair.target.registration.name} imports no KV")


def _assert_alike(pair: Pair, found: NDArray[np.float32], right: NDArray[np.float32], what: str) -> None:
    assert_close(found, right, pair.tolerance, what)
    assert_same_choices(found, right, pair.tolerance, what)


_CHECKS = (
    greedy_answers_are_the_same,
    kv_serves_the_other,
    kv_serves_the_other_while_it_decodes,
    kv_arrives_as_it_was,
    answers_are_the_same_apart,
    blocks_serve_the_other,
)

PAIR_CHECKS: Mapping[str, Callable[[Pair], None]] = {check.__name__: check for check in _CHECKS}
"""Every check of two backends, by its name."""
