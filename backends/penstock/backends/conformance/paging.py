"""Checks of blocks: they lie anywhere, are shared, given back and taken again, and a sequence that lost its own is replayed."""

from __future__ import annotations

import numpy as np

from penstock.backends.conformance.driver import Piece
from penstock.backends.conformance.subject import NotApplicable, Subject, assert_same_choices

__all__ = [
    "blocks_are_used_again",
    "blocks_lie_anywhere",
    "preempted_sequences_are_replayed",
    "prefixes_are_shared",
    "shared_blocks_are_only_read",
]


def blocks_lie_anywhere(subject: Subject) -> None:
    """Block ids in any order, up to the last one, give the same."""
    ids = subject.ids(70)
    chunk = 20 if subject.capabilities.chunked_prefill else None
    with subject.model() as model:
        right = subject.driver(model).logits(ids, chunk)
        shuffled = np.random.default_rng(0).permutation(model.kv.blocks).tolist()
        for order in (shuffled, list(reversed(range(model.kv.blocks)))):
            subject.assert_close(subject.driver(model, order).logits(ids, chunk), right, f"blocks {order[:3]} …")


def blocks_are_used_again(subject: Subject) -> None:
    """What a block held before is not seen by its next owner, also when that one fills it in part."""
    long, short = subject.ids(100, 1), subject.ids(19, 2)
    with subject.model() as model:
        driver = subject.driver(model)
        right = driver.logits(short)
        driver.logits(long)
        subject.assert_close(driver.logits(short), right, "in blocks used before")


def preempted_sequences_are_replayed(subject: Subject) -> None:
    """A sequence whose blocks went to others is computed anew, answer included, and goes on with the tokens that it would have."""
    prompt, others = subject.ids(40, 1), [subject.ids(60, 2), subject.ids(45, 3)]
    with subject.model() as model:
        driver = subject.driver(model)
        kept, logits = driver.prefill(prompt)
        ids, right = driver.greedy(kept, int(logits[-1].argmax()), 16)
        driver.release(kept)
        sequence, _ = driver.prefill(prompt)
        driver.follow(sequence, ids[:7])
        driver.release(sequence)
        running = [driver.prefill(other)[0] for other in others]  # in the blocks that it had
        again, logits = driver.prefill(prompt + ids[:7])
        for other in running:
            driver.step(Piece(other, ids[:1]))
        found = np.concatenate((logits[-1:], driver.follow(again, ids[7:])))
    subject.assert_close(found, right[6:], "behind a replay")
    assert_same_choices(found, right[6:], subject.tolerance, "behind a replay")


def prefixes_are_shared(subject: Subject) -> None:
    """Sequences that read the same full blocks give what they give with blocks of their own."""
    if not subject.capabilities.prefix_cache:
        raise NotApplicable("it shares no blocks")
    with subject.model() as model:
        driver, size = subject.driver(model), model.kv.block_size
        prefix = subject.ids(2 * size)
        first, _ = driver.prefill(prefix)
        tails = [subject.ids(length, seed) for seed, length in ((1, 1), (2, 7), (3, size))]
        sharing = [driver.sequence(first.blocks) for _ in tails]
        together = driver.step(*(Piece(s, tail) for s, tail in zip(sharing, tails, strict=True)))
        for tail, found in zip(tails, together, strict=True):
            subject.assert_close(found, driver.logits(prefix + tail)[-1:], f"{len(tail)} tokens behind a shared prefix")


def shared_blocks_are_only_read(subject: Subject) -> None:
    """What sequences do behind a shared prefix changes nothing in it: not for its first owner, nor for one that comes later."""
    if not subject.capabilities.prefix_cache:
        raise NotApplicable("it shares no blocks")
    with subject.model() as model:
        driver, size = subject.driver(model), model.kv.block_size
        prefix, tail, answer = subject.ids(2 * size), subject.ids(5, 1), subject.ids(4, 2)
        alone, _ = driver.prefill(prefix)
        right = driver.follow(alone, answer)
        first, _ = driver.prefill(prefix)
        sharing = [driver.sequence(first.blocks) for _ in range(2)]
        driver.step(*(Piece(sequence, tail) for sequence in sharing))
        driver.step(*(Piece(sequence, answer[:1]) for sequence in sharing))
        subject.assert_close(driver.follow(driver.sequence(first.blocks), answer), right, "one that comes later")
        subject.assert_close(driver.follow(first, answer), right, "the first owner")
