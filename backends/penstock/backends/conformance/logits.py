"""Checks of what a step computes: a sequence's logits depend on its tokens, not on how they came or on what ran beside them."""

from __future__ import annotations

import numpy as np

from penstock.backends.conformance.driver import ALL, LAST, NONE, Driver, Piece, step_batch
from penstock.backends.conformance.reference import reference_logits
from penstock.backends.conformance.subject import NotApplicable, Subject, require
from penstock.backends.safetensors import Weights

__all__ = [
    "blocks_are_used_again",
    "blocks_lie_anywhere",
    "chunks_agree_with_the_whole",
    "largest_batch_is_taken",
    "logits_are_the_callers",
    "longest_context_is_taken",
    "mixed_batch_agrees_with_each_alone",
    "only_wanted_rows_come_back",
    "prefixes_are_shared",
    "prompt_agrees_with_the_formulas",
]


def prompt_agrees_with_the_formulas(subject: Subject) -> None:
    """Logits of every token of a prompt are those of the decoder written down in numpy."""
    if not subject.computes:
        raise NotApplicable("its logits are made up")
    ids = subject.ids(90)
    with Weights(subject.spec) as weights:
        right = reference_logits(subject.spec.decoder, weights, ids)
    with subject.model() as model:
        _, found = subject.driver(model).prefill(ids)
    right = right[-len(found) :]
    subject.assert_close(found, right, "prompt")


def chunks_agree_with_the_whole(subject: Subject) -> None:
    """A prompt in chunks, down to one token a step, gives what it gives at once."""
    if not subject.capabilities.chunked_prefill:
        raise NotApplicable("it takes prompts whole")
    ids = subject.ids(77)
    with subject.model() as model:
        driver, size = subject.driver(model), model.kv.block_size
        whole = _all_logits(driver, ids, len(ids))
        for chunk in (1, 3, size - 1, size, size + 1):
            subject.assert_close(_all_logits(driver, ids, max(1, chunk)), whole, f"chunks of {chunk}")


def mixed_batch_agrees_with_each_alone(subject: Subject) -> None:
    """Whole prompts, chunks and decodes of different lengths in one step do not touch one another; to the bit, where declared."""
    prompts = [subject.ids(length, seed) for seed, length in enumerate((1, 50, 33, 5, 64))]
    tails = [subject.ids(8, 100 + seed) for seed in range(len(prompts))]
    with subject.model(threads=None) as model:
        driver = subject.driver(model)
        alone = []
        for prompt, tail in zip(prompts, tails, strict=True):
            sequence = driver.sequence()
            alone.append([driver.step(Piece(sequence, ids))[0] for ids in (prompt, *([token] for token in tail))])
            driver.release(sequence)
        joined = [driver.sequence() for _ in prompts]
        for step in range(len(tails[0])):  # sequence i joins at step i
            running = range(min(step + 1, len(prompts)))
            found = driver.step(*(Piece(joined[i], prompts[i] if i == step else [tails[i][step - i - 1]]) for i in running))
            for i in running:
                right, where = alone[i][step - i], f"sequence {i} at step {step}"
                subject.assert_close(found[i], right, where)
                if subject.capabilities.batch_invariant:
                    require(
                        np.array_equal(found[i], right), f"{where}: other bits than alone, by a backend that is batch_invariant"
                    )


def prefixes_are_shared(subject: Subject) -> None:
    """Sequences that read the same full blocks give what they give with blocks of their own."""
    if not subject.capabilities.prefix_cache:
        raise NotApplicable("it shares no blocks")
    with subject.model() as model:
        driver = subject.driver(model)
        prefix = subject.ids(2 * model.kv.block_size)
        first, _ = driver.prefill(prefix)
        tails = [subject.ids(length, seed) for seed, length in ((1, 1), (2, 7), (3, model.kv.block_size))]
        sharing = [driver.sequence(first.blocks) for _ in tails]
        together = driver.step(*(Piece(s, tail, LAST) for s, tail in zip(sharing, tails, strict=True)))
        for tail, found in zip(tails, together, strict=True):
            right = _all_logits(driver, prefix + tail, len(prefix + tail))[-1:]
            subject.assert_close(found, right, f"{len(tail)} tokens behind a shared prefix")


def blocks_lie_anywhere(subject: Subject) -> None:
    """Block ids in any order, up to the last one, give the same."""
    ids = subject.ids(70)
    with subject.model() as model:
        right = _all_logits(subject.driver(model), ids, 20)
        shuffled = np.random.default_rng(0).permutation(model.kv.blocks).tolist()
        for order in (shuffled, list(reversed(range(model.kv.blocks)))):
            subject.assert_close(_all_logits(subject.driver(model, order), ids, 20), right, f"blocks {order[:3]} …")


def blocks_are_used_again(subject: Subject) -> None:
    """What a block held before is not seen by its next owner, also when that one fills it in part."""
    long, short = subject.ids(100, 1), subject.ids(19, 2)
    with subject.model() as model:
        driver = subject.driver(model)
        right = _all_logits(driver, short, len(short))
        filled, _ = driver.prefill(long)
        driver.release(filled)
        subject.assert_close(_all_logits(driver, short, len(short)), right, "in blocks used before")


def only_wanted_rows_come_back(subject: Subject) -> None:
    """None, some and all rows can be asked for, across sequences, in float32."""
    first, second = subject.ids(30, 1), subject.ids(40, 2)
    vocabulary = subject.spec.decoder.vocabulary_size
    with subject.model() as model:
        driver = subject.driver(model)

        def step(*rows: str) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
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
        right = _all_logits(driver, ids, len(ids))[-1]
        sequence, last = driver.sequence(), right
        for i in range(len(ids)):
            driver.extend(sequence, i + 1)
            last = model.step(step_batch([Piece(sequence, ids[i : i + 1])])).logits
            sequence.length += 1
            if i < len(ids) - 1:
                last[:] = np.nan
        subject.assert_close(last, right[None], "the last step")


def largest_batch_is_taken(subject: Subject) -> None:
    """As many sequences, and as many tokens, as the operator allows in one step."""
    with subject.model(max_batch_size=8, max_batch_tokens=160) as model:
        driver = subject.driver(model)
        prompts = [subject.ids(20, seed) for seed in range(8)]
        sequences = [driver.sequence() for _ in prompts]
        found = driver.step(*(Piece(s, ids) for s, ids in zip(sequences, prompts, strict=True)))
        for sequence in sequences:
            driver.release(sequence)
        for i, ids in enumerate(prompts):
            subject.assert_close(found[i], _all_logits(driver, ids, 20)[-1:], f"sequence {i} of 8")


def longest_context_is_taken(subject: Subject) -> None:
    """A sequence may fill the whole context, in steps of at most the operator's tokens."""
    context = subject.spec.decoder.context_length
    ids = subject.ids(context)
    with subject.model(max_batch_tokens=256) as model:
        found = _all_logits(subject.driver(model), ids, 256)[-1:]
        one_by_one = subject.driver(model)
        sequence = one_by_one.sequence()
        for start in range(0, context - 2, 100):
            one_by_one.step(Piece(sequence, ids[start : min(start + 100, context - 2)], NONE))
        one_by_one.step(Piece(sequence, ids[-2:-1], NONE))
        subject.assert_close(one_by_one.step(Piece(sequence, ids[-1:]))[0], found, "the last token of a full context")


def _all_logits(driver: Driver, ids: list[int], chunk: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """As `Driver.prefill`, and the blocks are given back."""
    sequence, logits = driver.prefill(ids, chunk)
    driver.release(sequence)
    return logits
