"""Checks of a step that tells what decides in place of whole rows: it is that of the rows, to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np

from penstock.backends.conformance.driver import ALL, LAST, NONE, Driver, Piece, SequenceState, step_batch
from penstock.backends.conformance.subject import NotApplicable, Subject, require
from penstock.backends.contract import GenerativeModel, StepBatch, TopLogits, TopOutput, TopRequest

__all__ = [
    "named_tokens_and_masses_are_those_of_whole_rows",
    "top_logits_are_those_of_whole_rows",
    "top_logits_leave_the_same_behind",
]

# Relative error of a mass: a float32 sum in any order is nearer, and a draw is off by no more.
_MASS_TOLERANCE = 1e-4


def top_logits_are_those_of_whole_rows(subject: Subject) -> None:
    """Of decodes, prompts and both: as many of the likeliest tokens as are asked for, and whole rows where none are, or later."""
    every = ALL if subject.capabilities.prompt_logits else LAST
    with _models(subject) as (model, top):
        driver = subject.driver(model)
        decodes = _decodes(subject, driver)
        prompts = [Piece(driver.sequence(), subject.ids(length, 9), rows) for length, rows in ((20, every), (7, LAST), (5, NONE))]
        most = min(top.most_top, subject.spec.decoder.vocabulary_size)
        for pieces in (decodes, prompts, [*decodes, *prompts], [prompts[-1]]):
            batch = _batch(driver, pieces)
            right = model.step(batch).logits.copy()
            for counts in ((1, 0, 2, most), (1,), (0,)):
                request = _request(np.resize(counts, len(right)).tolist())
                found = top.step_top(batch, request)
                _check(found, right, request)
                later = np.flatnonzero(found.whole < 0)[::-1]
                if len(later):
                    require(np.array_equal(top.rows_of_top(later), right[later]), f"rows {later.tolist()}, asked for later, differ")


def named_tokens_and_masses_are_those_of_whole_rows(subject: Subject) -> None:
    """Tokens that are named are told beside the likeliest of the others, with the mass of these."""
    with _models(subject) as (model, top):
        driver = subject.driver(model)
        batch = _batch(driver, _decodes(subject, driver))
        right = model.step(batch).logits.copy()
        order, count = np.argsort(-right, axis=1, kind="stable"), min(top.most_top, 5)
        likely, some = [np.sort(row[:3]) for row in order], [np.sort(row[[0, 2, -1]]) for row in order]
        nothing = np.empty(0, np.int64)
        for named in (likely, [some[0], nothing, likely[2]], [nothing] * 3):
            for temperatures in ((1.0, 0.5, 2.0), (0.3, 0.0, 1.0)):
                request = _request([count] * 3, named, temperatures)
                _check(top.step_top(batch, request), right, request)
        request = _request([count, 0, count], [likely[0], nothing, some[2]], (0.7, 0.0, 1.5))
        _check(top.step_top(batch, request), right, request)


def top_logits_leave_the_same_behind(subject: Subject) -> None:
    """A sequence of which only the likeliest token was ever told goes on as one whose rows were told whole."""
    ids = subject.ids(33)
    with _models(subject) as (model, top):
        driver = subject.driver(model)
        sequence, logits = driver.prefill(ids)
        first = int(logits[-1].argmax())
        answer, right = driver.greedy(sequence, first, 16)
        other, token, found = driver.sequence(), first, [first]
        _likeliest(driver, top, Piece(other, ids))
        for _ in answer[1:]:
            token = _likeliest(driver, top, Piece(other, [token]))
            found.append(token)
        require(found == answer, f"the likeliest tokens are {found}, and {answer} by whole rows")
        subject.assert_continues(driver.follow(other, answer[-1:]), right[-1:], "behind steps that told the likeliest token alone")


def _check(found: TopOutput, right: np.ndarray, request: TopRequest) -> None:
    """That of each row what was asked for is told, or the row."""
    require(found.starts.shape == (len(right) + 1,) and found.whole.shape == (len(right),), "it does not tell of each row")
    require(found.named.shape == request.named.shape, "it does not tell of each named token")
    for r, row in enumerate(right):
        ids, place, count = found.ids[found.starts[r] : found.starts[r + 1]], int(found.whole[r]), int(request.counts[r])
        if place >= 0:
            require(len(ids) == 0 and np.array_equal(found.logits[place], row), f"row {r} is told whole, and is not the row")
            continue
        require(count > 0, f"row {r} was asked for whole, and is not told")
        here = slice(request.named_starts[r], request.named_starts[r + 1])
        named, others = request.named[here], row.copy()
        others[named] = -np.inf
        expected = np.flatnonzero(others >= np.partition(others, -count)[-count])
        require(
            np.array_equal(ids, expected), f"the {count} likeliest of row {r} are {expected.tolist()}, and {ids.tolist()} are told"
        )
        values = found.values[found.starts[r] : found.starts[r + 1]]
        require(np.array_equal(values, row[expected]), f"logits of row {r} are not those of the row")
        require(np.array_equal(found.named[here], row[named]), f"logits of the named tokens of row {r} are not those of the row")
        if request.temperatures[r]:
            _check_masses(found.log_masses[r], others.astype(np.float64), float(request.temperatures[r]), r)


def _check_masses(told: np.ndarray, others: np.ndarray, temperature: float, r: int) -> None:
    expected = [np.logaddexp.reduce(others), np.logaddexp.reduce(others / temperature)]
    require(
        np.allclose(told, expected, rtol=0, atol=_MASS_TOLERANCE),
        f"the logarithms of the masses of row {r} are {expected} at temperatures 1 and {temperature}, and {told.tolist()} are told",
    )


def _request(
    counts: Sequence[int], named: Sequence[np.ndarray] | None = None, temperatures: Sequence[float] | None = None
) -> TopRequest:
    named = named or [np.empty(0, np.int64)] * len(counts)
    return TopRequest(
        counts=np.array(counts, np.int32),
        named_starts=np.cumsum([0, *map(len, named)]),
        named=np.concatenate([np.empty(0, np.int64), *named]),
        temperatures=np.array(temperatures or [0.0] * len(counts), np.float64),
    )


def _decodes(subject: Subject, driver: Driver) -> list[Piece]:
    """A next token of each of three sequences."""
    running = [driver.prefill(subject.ids(length, length))[0] for length in (3, 40, 17)]
    return [Piece(sequence, subject.ids(1, i)) for i, sequence in enumerate(running)]


def _batch(driver: Driver, pieces: list[Piece]) -> StepBatch:
    for piece in pieces:
        driver.extend(piece.sequence, piece.sequence.length + len(piece.ids))
    return step_batch(pieces)


def _likeliest(driver: Driver, top: TopLogits, piece: Piece) -> int:
    """Compute new tokens of a sequence, and give the likeliest one behind them."""
    sequence: SequenceState = piece.sequence
    found = top.step_top(_batch(driver, [piece]), _request([1]))
    sequence.length += len(piece.ids)
    return int(found.logits[0].argmax() if found.whole[0] >= 0 else found.ids[found.values.argmax()])


@contextmanager
def _models(subject: Subject) -> Iterator[tuple[GenerativeModel, TopLogits]]:
    """A model, and the same one as one that tells the likeliest tokens."""
    with subject.model() as model:
        if not isinstance(model, TopLogits) or not model.most_top:
            raise NotApplicable("it tells whole rows of logits alone")
        yield model, cast("TopLogits", model)
