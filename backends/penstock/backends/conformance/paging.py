"""Checks of blocks: they lie anywhere, are shared or copied, given back and taken again; who lost its own is replayed."""

from __future__ import annotations

import numpy as np

from penstock.backends.conformance.driver import Piece
from penstock.backends.conformance.refusals import refused
from penstock.backends.conformance.subject import NotApplicable, Subject, require
from penstock.backends.contract import KvChunk
from penstock.backends.kv_abilities import prefix_copies

__all__ = [
    "blocks_are_used_again",
    "blocks_lie_anywhere",
    "blocks_that_held_nan_are_used_again",
    "cached_prefixes_stay_as_they_are",
    "preempted_sequences_are_replayed",
    "prefixes_are_copied_as_far_as_they_are_there",
    "sequences_begin_with_cached_prefixes",
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


def blocks_that_held_nan_are_used_again(subject: Subject) -> None:
    """KV that is no numbers, as a step may give that went wrong, is not seen by who takes its blocks, nor by any other sequence."""
    if not subject.capabilities.import_kv:
        raise NotApplicable("it imports no KV")
    prompts, answer = (subject.ids(67, 1), subject.ids(99, 2)), subject.ids(4, 3)
    with subject.model() as model:
        size = model.kv.block_size
        driver = subject.driver(model, list(reversed(range(model.kv.blocks))))
        right = [driver.follow(driver.prefill(prompt)[0], answer) for prompt in prompts]
        driver = subject.driver(model)
        spoilt = driver.sequence()
        driver.extend(spoilt, sum(-(-(len(prompt) + len(answer)) // size) + 1 for prompt in prompts) * size)
        nan = np.full(model.kv.canonical_shape(size), np.nan, np.float32)
        for block in spoilt.blocks:
            model.import_kv([block], KvChunk(range(size), nan))
        never_again = spoilt.blocks.pop(0)  # what a batch is padded with may be any block
        require(never_again == 0, "the first block is not block 0")
        driver.release(spoilt)
        sequences = [driver.prefill(prompt)[0] for prompt in prompts]
        steps = [driver.step(*(Piece(sequence, [token]) for sequence in sequences)) for token in answer]
        for which, found in enumerate(zip(*steps, strict=True)):
            subject.assert_close(np.concatenate(found), right[which], f"sequence {which} in blocks that held NaN")


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


def sequences_begin_with_cached_prefixes(subject: Subject) -> None:
    """Sequences behind the same full blocks, or behind copies of them, give what they give when they computed all themselves."""
    if not subject.capabilities.prefix_cache:
        raise NotApplicable("it has no prefix cache")
    with subject.model() as model:
        driver, size = subject.driver(model), model.kv.block_size
        prefix = subject.ids(2 * size)
        first, _ = driver.prefill(prefix)
        tails = [subject.ids(length, seed) for seed, length in ((1, 1), (2, 7), (3, size))]
        behind = [driver.sequence(first.blocks) for _ in tails]
        require(all(sequence.length == len(prefix) for sequence in behind), "not all of a prefix was copied that is there")
        together = driver.step(*(Piece(s, tail) for s, tail in zip(behind, tails, strict=True)))
        for tail, found in zip(tails, together, strict=True):
            subject.assert_close(found, driver.logits(prefix + tail)[-1:], f"{len(tail)} tokens behind a cached prefix")


def cached_prefixes_stay_as_they_are(subject: Subject) -> None:
    """What sequences do behind a cached prefix changes nothing in it: not for its first owner, nor for one that comes later."""
    if not subject.capabilities.prefix_cache:
        raise NotApplicable("it has no prefix cache")
    with subject.model() as model:
        driver, size = subject.driver(model), model.kv.block_size
        prefix, tail, answer = subject.ids(2 * size), subject.ids(5, 1), subject.ids(4, 2)
        alone, _ = driver.prefill(prefix)
        right = driver.follow(alone, answer)
        first, _ = driver.prefill(prefix)
        prefix_blocks = list(first.blocks)
        behind = [driver.sequence(prefix_blocks) for _ in range(2)]
        driver.step(*(Piece(sequence, tail) for sequence in behind))
        driver.step(*(Piece(sequence, answer[:1]) for sequence in behind))
        subject.assert_close(driver.follow(driver.sequence(prefix_blocks), answer), right, "one that comes later")
        subject.assert_close(driver.follow(first, answer), right, "the first owner")


def prefixes_are_copied_as_far_as_they_are_there(subject: Subject) -> None:
    """Of blocks of several ended sequences, of which one has lost its begin, as many are copied as are still what they were."""
    if not subject.capabilities.prefix_cache:
        raise NotApplicable("it has no prefix cache")
    with subject.model() as model:
        copies = prefix_copies(model)
        if copies is None:
            raise NotApplicable("its sequences share prefixes")
        driver, size = subject.driver(model), model.kv.block_size
        prefix, tail = subject.ids(3 * size), subject.ids(9, 1)
        first, second = (list(driver.prefill(prefix)[0].blocks) for _ in range(2))
        taker = driver.sequence()
        taker.blocks.append(first[1])
        driver.step(Piece(taker, subject.ids(3, 2)))
        behind = driver.sequence()
        driver.extend(behind, 3 * size)
        copied = copies.copy_prefix([first[0], second[1], first[2]], behind.blocks)
        require(2 <= copied <= 3, f"{copied} of 3 blocks were copied, of which at least the first 2 are what they were")
        del behind.blocks[copied:]
        behind.length = copied * size
        right = driver.logits(prefix[: behind.length] + tail)[-1:]
        subject.assert_close(driver.step(Piece(behind, tail))[0], right, f"behind {copied} blocks of a prefix")
        refused(lambda: copies.copy_prefix([model.kv.blocks], behind.blocks[:1]), "a block that is not there")
        refused(lambda: copies.copy_prefix(second[:1], [-1]), "a negative block")
        refused(lambda: copies.copy_prefix(second[:2], behind.blocks[:1]), "two blocks into one")
        refused(lambda: copies.copy_prefix(second[:1], second[:1]), "a block into itself")
