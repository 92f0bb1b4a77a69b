"""Checks of what a step computes: the model's formulas, and nothing else: not how tokens came, nor what ran beside them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from penstock.backends.conformance.driver import ALL, LAST, NONE, Piece, step_batch
from penstock.backends.conformance.reference import log_softmax
from penstock.backends.conformance.subject import NotApplicable, Subject, assert_same_choices, require

__all__ = [
    "chunks_agree_with_the_whole",
    "decoding_agrees_with_the_formulas",
    "logits_are_the_callers",
    "logprobs_agree_with_the_formulas",
    "mixed_batch_agrees_with_each_alone",
    "only_wanted_rows_come_back",
    "prompt_agrees_with_the_formulas",
]

# A log-probability may be off by so many times the root-mean-square error that its row of logits may have.
_LOGPROB_ERRORS = 6.0


def prompt_agrees_with_the_formulas(subject: Subject) -> None:
    """Logits of every token of a prompt are those of the decoder written down in numpy."""
    ids = subject.ids(90)
    right = subject.truth(ids).logits
    with subject.model() as model:
        found = subject.driver(model).logits(ids)
    subject.assert_close(found, right[-len(found) :], "prompt")


def decoding_agrees_with_the_formulas(subject: Subject) -> None:
    """Greedy tokens, one a step, are those of the decoder written down in numpy, and so are their logits."""
    prompt = subject.ids(45, 3)
    with subject.model() as model:
        driver = subject.driver(model)
        sequence, logits = driver.prefill(prompt)
        ids, found = driver.greedy(sequence, int(logits[-1].argmax()), 24)
    right = subject.truth(prompt + ids).logits[-len(ids) - 1 :]
    found = np.concatenate((logits[-1:], found))
    subject.assert_close(found, right, "decoding")
    assert_same_choices(found, right, subject.tolerance, "decoding")


def logprobs_agree_with_the_formulas(subject: Subject) -> None:
    """Log-probabilities of a prompt's tokens and of an answer's are those of the formulas, within a bound in nats."""
    prompt, answer = subject.ids(40, 5), subject.ids(12, 6)
    truth = subject.truth(prompt + answer).logits[:-1]
    with subject.model() as model:
        driver = subject.driver(model)
        sequence, logits = driver.prefill(prompt)
        found = np.concatenate((logits, driver.follow(sequence, answer[:-1])))
    right, computed = _logprobs_of(truth[-len(found) :], prompt + answer), _logprobs_of(found, prompt + answer)
    bound = _LOGPROB_ERRORS * subject.tolerance * float(np.sqrt(np.mean(truth**2)))
    off = np.abs(computed - right)
    require(bool((off <= bound).all()), f"token {off.argmax()} is off by {off.max():.2g} nats; {bound:.2g} are allowed")


def _logprobs_of(logits: NDArray[np.float32] | NDArray[np.float64], ids: list[int]) -> NDArray[np.float64]:
    """The log-probability of the last `len(logits)` of these tokens, each by the row before it."""
    logprobs: NDArray[np.float64] = log_softmax(logits)[np.arange(len(logits)), ids[-len(logits) :]]
    return logprobs


def chunks_agree_with_the_whole(subject: Subject) -> None:
    """A prompt in chunks, down to one token a step, gives what it gives at once."""
    if not subject.capabilities.chunked_prefill:
        raise NotApplicable("it takes prompts whole")
    ids = subject.ids(77)
    with subject.model() as model:
        driver, size = subject.driver(model), model.kv.block_size
        whole = driver.logits(ids)
        for chunk in (1, 3, size - 1, size, size + 1):
            if 0 < chunk < len(ids):
                found = driver.logits(ids, chunk)
                subject.assert_close(found, whole[-len(found) :], f"chunks of {chunk}")


def mixed_batch_agrees_with_each_alone(subject: Subject) -> None:
    """Whole prompts, chunks and decodes of many lengths in one step do not touch one another; to the bit, where declared."""
    prompts = [subject.ids(length, seed) for seed, length in enumerate((1, 50, 33, 5, 64))]
    pieces = [[prompt, *([token] for token in subject.ids(8, 100 + seed))] for seed, prompt in enumerate(prompts)]
    if subject.capabilities.chunked_prefill:
        pieces[2:2] = [[ids[:20], ids[20:21], ids[21:], *([token] for token in ids[:6])] for ids in (subject.ids(58, 50),)]
    exactly = subject.capabilities.batch_invariant
    with subject.model(threads=None if exactly else 1) as model:
        driver = subject.driver(model)
        alone = []
        for own in pieces:
            sequence = driver.sequence()
            alone.append([driver.step(Piece(sequence, ids))[0] for ids in own])
            driver.release(sequence)
        joined = [driver.sequence() for _ in pieces]
        for step in range(min(map(len, pieces))):  # sequence i joins at step i
            running = range(min(step + 1, len(pieces)))
            found = driver.step(*(Piece(joined[i], pieces[i][step - i]) for i in running))
            for i in running:
                right, where = alone[i][step - i], f"sequence {i} at step {step}"
                subject.assert_close(found[i], right, where)
                if exactly:
                    require(np.array_equal(found[i], right), f"{where}: other bits than alone, though it is batch_invariant")


def only_wanted_rows_come_back(subject: Subject) -> None:
    """None, some and all rows can be asked for, across sequences, in float32."""
    first, second = subject.ids(30, 1), subject.ids(40, 2)
    vocabulary = subject.spec.decoder.vocabulary_size
    with subject.model() as model:
        driver = subject.driver(model)

        def step(*rows: str) -> list[NDArray[np.float32]]:
            sequences = driver.sequence(), driver.sequence()
            found = driver.step(*(Piece(s, ids, r) for s, ids, r in zip(sequences, (first, second), rows, strict=True)))
            for sequence in sequences:
                driver.release(sequence)
            return found

        require([f.shape for f in step(NONE, NONE)] == [(0, vocabulary)] * 2, "no rows asked for, some came")
        last = step(LAST, LAST)
        require(all(logits.dtype == np.float32 for logits in last), "logits are not float32")
        subject.assert_close(step(NONE, LAST)[1], last[1], "the second sequence's last row alone")
        if subject.capabilities.prompt_logits:
            every = step(ALL, LAST)
            require(every[0].shape == (30, vocabulary), f"all 30 rows are {every[0].shape}")
            subject.assert_close(every[0][-1:], last[0], "the last of all rows")
            subject.assert_close(every[1], last[1], "a last row behind all rows")


def logits_are_the_callers(subject: Subject) -> None:
    """The caller may overwrite the logits; the next step is none the worse."""
    ids = subject.ids(12)
    with subject.model() as model:
        driver = subject.driver(model)
        right = driver.logits(ids)[-1:]
        sequence, last = driver.sequence(), right
        for i in range(len(ids)):
            driver.extend(sequence, i + 1)
            last = model.step(step_batch([Piece(sequence, ids[i : i + 1])])).logits
            sequence.length += 1
            if i < len(ids) - 1:
                last[:] = np.nan
        subject.assert_close(last, right, "the last step")
