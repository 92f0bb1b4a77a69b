"""Checks of blocks: they lie anywhere, are shared, given back and taken again, and a sequence that lost its own is replayed."""

from __future__ import annotations

import numpy as np

from penstock.backends.conformance.driver import Piece
from penstock.backends.conformance.subject import NotApplicable, Subject

__all__ = [
    "blocks_are_used_again",
    "blocks_lie_anywhere",
    "preempted_sequences_are_replayed",
    "prefixes_are_shared",
    "shared_blocks_are_only_read",
]


def blocks_lie_anywhere(subject: Subject) -> None:
    """Blocks in any order, up to the last one, of sequences that grow in turn and so lie among one another, give the same."""
    prompts, answer = (subject.ids(70), subject.ids(37, 1)), subject.ids(24, 2)
    with subject.model() as model:
        right = []
        for prompt in prompts:
            driver = subject.driver(model)
            right.append(driver.follow(driver.prefill(prompt)[0], answer))
        needed = sum(-(-(len(prompt) + len(answer)) // model.kv.block_size) for prompt in prompts)
        last = list(range(model.kv.blocks))[-needed:]
        for order in (np.random.default_rng(0).permutation(last).tolist(), last[::-1]):
            driver = subject.driver(model, order)
            sequences = [driver.prefill(prompt)[0] for prompt in prompts]
            steps = [driver.step(*(Piece(sequence, [token]) for sequence in sequences)) for token in answer]
            for which, found in enumerate(zip(*steps, strict=True)):
                subject.assert_close(np.concatenate(found), right[which], f"sequence {which} in blocks {order[:3]} …")


def blocks_are_used_again(subject: Subject) -> None:
    """What a block held before is not seen by its next owner, also when that one fills it in part."""
    long, short = subject.ids(100, 1), subject.ids(19, 2)
    with subject.model() as model:
        right = subject.driver(model, list(reversed(range(model.kv.blocks)))).logits(short)
        driver = subject.driver(model)
        driver.logits(long)
        subject.assert_close(driver.logits(short), right, "in blocks used before")


def preempted_sequences_are_replayed(subject: Subject) -> None:
    """A sequence whose blocks others took and gave back is computed anew, answer included, and goes on as it would have."""
    prompt, others = subject.ids(40, 1), [subject.ids(60, 2), subject.ids(45, 3)]
    with subject.model() as model:
        apart = subject.driver(model, list(reversed(range(model.kv.blocks))))
        undisturbed, logits = apart.prefill(prompt)
        answer, right = apart.greedy(undisturbed, int(logits[-1].argmax()), 16)
        alone = apart.follow(apart.prefill(others[1])[0], answer)
        driver = subject.driver(model)
        sequence, _ = driver.prefill(prompt)
        driver.follow(sequence, answer[:7])
        driver.release(sequence)
        first, second = (driver.prefill(other)[0] for other in others)  # the first one where the sequence was
        begun = driver.follow(second, answer[:5])
        driver.release(first)
        again, logits = driver.prefill(prompt + answer[:7])
        found = np.concatenate((logits[-1:], driver.follow(again, answer[7:])))
        subject.assert_continues(found, right[6:], "behind a replay")
        kept = np.concatenate((begun, driver.follow(second, answer[5:])))
        subject.assert_close(kept, alone, "a sequence that went on beside it")


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
