"""Checks of limits: what a model was created for is taken in full, and what lies beyond is refused before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from penstock.backends.conformance.driver import NONE, Driver, Piece, SequenceState, step_batch
from penstock.backends.conformance.refusals import refused
from penstock.backends.conformance.subject import Subject, require
from penstock.backends.contract import DType, GenerativeModel, StepBatch
from penstock.common.service import StartError

__all__ = [
    "it_keeps_within_its_memory",
    "largest_batch_is_taken",
    "longest_context_is_taken",
    "steps_beyond_the_limits_are_refused",
    "wrong_settings_are_refused",
]


def it_keeps_within_its_memory(subject: Subject) -> None:
    """The cache is no larger than the operator allows and no smaller than it could be; the rest of what it says holds too."""
    budget = subject.cache_bytes // 4
    with subject.model(kv_cache_bytes=budget) as model:
        kv = model.kv
        require(kv.block_size > 0, f"blocks of {kv.block_size} tokens")
        require(0 < kv.blocks * kv.bytes_per_block <= budget, f"{kv.blocks} blocks of {kv.bytes_per_block} bytes within {budget}")
        require((kv.blocks + 2) * kv.bytes_per_block > budget, "two blocks more would fit")
        require(model.dtype == subject.dtype, f"it was to be {subject.dtype} and is {model.dtype}")
        require(bool(model.device and kv.layout and kv.dtype), "device, layout or type of the cache has no name")
        layouts = subject.capabilities.kv_layouts
        require(not layouts or kv.layout in layouts, f"its cache lies as {kv.layout}, and it told {', '.join(layouts)}")


def wrong_settings_are_refused(subject: Subject) -> None:
    """A cache that holds no block, and a type that the backend has not, are told as what they are."""
    refusals = StartError, ValueError, MemoryError
    refused(partial(_start, subject, kv_cache_bytes=1), "a KV cache of one byte", *refusals)
    for dtype in set(DType) - set(subject.capabilities.dtypes):
        refused(partial(_start, subject, dtype=dtype), f"the type {dtype}, which is none of its own", *refusals)


def _start(subject: Subject, **settings: Any) -> None:
    with subject.model(**settings):
        pass


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
            subject.assert_close(found[i], driver.logits(ids)[-1:], f"sequence {i} of 8")


def longest_context_is_taken(subject: Subject) -> None:
    """A sequence may fill the whole context, in steps of at most the operator's tokens."""
    ids = subject.ids(subject.context)
    with subject.model(max_batch_tokens=256) as model:
        found = subject.driver(model).logits(ids, 256)[-1:]
        one_by_one = subject.driver(model)
        sequence = one_by_one.sequence()
        for start in range(0, len(ids) - 2, 100):
            one_by_one.step(Piece(sequence, ids[start : min(start + 100, len(ids) - 2)], NONE))
        one_by_one.step(Piece(sequence, ids[-2:-1], NONE))
        subject.assert_close(one_by_one.step(Piece(sequence, ids[-1:]))[0], found, "the last token of a full context")


def steps_beyond_the_limits_are_refused(subject: Subject) -> None:
    """Steps beyond what was asked for, or with blocks or ids that are not there, raise ValueError and write nothing."""
    with subject.model(max_batch_size=4, max_batch_tokens=48, max_context=64) as model:
        driver, ids = subject.driver(model), subject.ids(40)
        kept, _ = driver.prefill(ids)
        for what, batch in _wrong_steps(subject, model, driver, kept):
            refused(partial(model.step, batch), what)
        (found,) = driver.step(Piece(kept, [ids[0]]))
        subject.assert_close(found, driver.logits([*ids, ids[0]])[-1:], "behind steps that were refused")


def _wrong_steps(subject: Subject, model: GenerativeModel, driver: Driver, kept: SequenceState) -> list[tuple[str, StepBatch]]:
    def batch(lengths: Sequence[int], **changed: Any) -> StepBatch:
        sequences = [driver.sequence() for _ in lengths]
        for sequence, length in zip(sequences, lengths, strict=True):
            driver.extend(sequence, length)
        made = step_batch([Piece(s, subject.ids(length)) for s, length in zip(sequences, lengths, strict=True)])
        for sequence in sequences:
            driver.release(sequence)
        return replace(made, **changed)

    def numbers(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return np.array(values, np.int32)

    beyond = SequenceState(60, [*kept.blocks, *kept.blocks, *kept.blocks][: -(-65 // model.kv.block_size)])
    vocabulary = subject.spec.decoder.vocabulary_size
    return [
        ("a step of five sequences where four are the most", batch([1] * 5)),
        ("a step of 49 tokens where 48 are the most", batch([24, 25])),
        ("a sequence of 65 tokens where the context holds 64", step_batch([Piece(beyond, subject.ids(5))])),
        ("a block that is not there", batch([1], block_ids=numbers(model.kv.blocks))),
        ("a negative block", batch([1], block_ids=numbers(-1))),
        ("fewer blocks than a sequence needs", batch([1], block_ids=numbers(), block_starts=numbers(0, 0))),
        ("a token behind the vocabulary", batch([1], token_ids=np.array([vocabulary]))),
        ("a negative token", batch([1], token_ids=np.array([-1]))),
    ]
