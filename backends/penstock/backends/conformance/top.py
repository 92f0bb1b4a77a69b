"""Checks of a step that tells the likeliest tokens in place of whole rows: they are those of the rows, to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np

from penstock.backends.conformance.driver import ALL, LAST, NONE, Driver, Piece, SequenceState, step_batch
from penstock.backends.conformance.subject import NotApplicable, Subject, require
from penstock.backends.contract import GenerativeModel, StepBatch, TopLogits, TopOutput

__all__ = ["top_logits_are_those_of_whole_rows", "top_logits_leave_the_same_behind"]


def top_logits_are_those_of_whole_rows(subject: Subject) -> None:
    """Of decodes, prompts and both: as many of the likeliest tokens as are asked for, and whole rows where none are."""
    every = ALL if subject.capabilities.prompt_logits else LAST
    with _models(subject) as (model, top):
        driver = subject.driver(model)
        running = [driver.prefill(subject.ids(length, length))[0] for length in (3, 40, 17)]
        decodes = [Piece(sequence, subject.ids(1, i)) for i, sequence in enumerate(running)]
        prompts = [Piece(driver.sequence(), subject.ids(length, 9), rows) for length, rows in ((20, every), (7, LAST), (5, NONE))]
        most = min(top.most_top, subject.spec.decoder.vocabulary_size)
        for pieces in (decodes, prompts, [*decodes, *prompts], [prompts[-1]]):
            batch = _batch(driver, pieces)
            right = model.step(batch).logits.copy()
            for counts in (np.resize((1, 0, 2, most), len(right)), np.ones(len(right)), np.zeros(len(right))):
                _check(top.step_top(batch, counts.astype(np.int32)), right, counts.astype(np.int64))


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


def _check(found: TopOutput, right: np.ndarray, counts: np.ndarray) -> None:
    """That these are so many of the likeliest of each row, with those as likely as the last."""
    require(found.starts.shape == (len(right) + 1,) and found.whole.shape == (len(right),), "it does not tell of each row")
    for r, (row, count) in enumerate(zip(right, counts, strict=True)):
        ids, place = found.ids[found.starts[r] : found.starts[r + 1]], int(found.whole[r])
        if place >= 0:
            require(len(ids) == 0 and np.array_equal(found.logits[place], row), f"row {r} is told whole, and is not the row")
            continue
        require(count > 0, f"row {r} was asked for whole, and is not told")
        expected = np.flatnonzero(row >= np.partition(row, -count)[-count])
        require(
            np.array_equal(ids, expected), f"the {count} likeliest of row {r} are {expected.tolist()}, and {ids.tolist()} are told"
        )
        values = found.values[found.starts[r] : found.starts[r + 1]]
        require(np.array_equal(values, row[expected]), f"logits of row {r} are not those of the row")


def _batch(driver: Driver, pieces: list[Piece]) -> StepBatch:
    for piece in pieces:
        driver.extend(piece.sequence, piece.sequence.length + len(piece.ids))
    return step_batch(pieces)


def _likeliest(driver: Driver, top: TopLogits, piece: Piece) -> int:
    """Compute new tokens of a sequence, and give the likeliest one behind them."""
    sequence: SequenceState = piece.sequence
    found = top.step_top(_batch(driver, [piece]), np.ones(1, np.int32))
    sequence.length += len(piece.ids)
    return int(found.logits[0].argmax() if found.whole[0] >= 0 else found.ids[found.values.argmax()])


@contextmanager
def _models(subject: Subject) -> Iterator[tuple[GenerativeModel, TopLogits]]:
    """A model, and the same one as one that tells the likeliest tokens."""
    with subject.model() as model:
        if not isinstance(model, TopLogits) or not model.most_top:
            raise NotApplicable("it tells whole rows of logits alone")
        yield model, cast("TopLogits", model)
