"""Checks of KV that leaves a cache as blocks, as they lie, and enters another one of the same native layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from penstock.backends.conformance.driver import Piece
from penstock.backends.conformance.refusals import refused
from penstock.backends.conformance.subject import NotApplicable, Subject, require
from penstock.backends.contract import GenerativeModel, KvSpec, NativeKv
from penstock.backends.kv_abilities import native_kv

__all__ = [
    "native_blocks_are_copies",
    "native_blocks_are_used",
    "native_blocks_leave_others_alone",
    "native_layout_names_the_form",
    "wrong_native_blocks_are_refused",
]


def native_blocks_are_used(subject: Subject) -> None:
    """A sequence whose blocks came as they were, into others and the last one filled in part, goes on to the bit as it was."""
    ids = subject.ids(50)
    with _models(subject) as (source, away), _models(subject) as (target, here):
        giver, taker = (subject.driver(model, list(reversed(range(model.kv.blocks)))) for model in (source, target))
        sequence, logits = giver.prefill(ids)
        moved = taker.sequence()
        taker.extend(moved, len(ids))
        data = away.export_blocks(sequence.blocks)
        here.import_blocks(moved.blocks[:1], data[:1])
        here.import_blocks(moved.blocks[:0:-1], data[:0:-1])
        moved.length = len(ids)
        sent, came = (model.export_kv(s.blocks, range(50)).data for model, s in ((source, sequence), (target, moved)))
        require(sent.tobytes() == came.tobytes(), "KV that went over as blocks is not what it was")
        answer, right = giver.greedy(sequence, int(logits[-1].argmax()), 16)
        subject.assert_continues(taker.follow(moved, answer), right, "behind blocks as they were")


def native_blocks_are_copies(subject: Subject) -> None:
    """As many bytes as the cache has for a block, in the order asked for, which stay what they are when the blocks go on."""
    with _models(subject) as (model, native):
        driver = subject.driver(model)
        sequence, _ = driver.prefill(subject.ids(50))
        blocks = sequence.blocks
        data = native.export_blocks(blocks)
        expected = len(blocks), model.kv.bytes_per_block
        require(data.shape == expected and data.dtype == np.uint8, f"{data.dtype} {data.shape}, not uint8 {expected}")
        before = data.copy()
        backwards = native.export_blocks([*reversed(blocks), blocks[0]])
        require(np.array_equal(backwards, np.concatenate((before[::-1], before[:1]))), "another order gives other blocks")
        driver.step(Piece(sequence, subject.ids(5)))
        driver.release(sequence)
        driver.prefill(subject.ids(60, 9))
        require(np.array_equal(data, before), "exported blocks change when the cache's are used again")


def native_blocks_leave_others_alone(subject: Subject) -> None:
    """What is imported touches no block beside its own: not those of a sequence that runs, nor of a prefix that is shared."""
    with _models(subject) as (source, away), _models(subject) as (target, here):
        giver, driver = subject.driver(source), subject.driver(target)
        size = target.kv.block_size
        running, _ = driver.prefill(subject.ids(2 * size + 3, 1))
        held = target.export_kv(running.blocks, range(running.length)).data
        sent, _ = giver.prefill(subject.ids(2 * size + 5))
        moved = driver.sequence(running.blocks[:1]) if subject.capabilities.prefix_cache else driver.sequence()
        shared = len(moved.blocks)
        driver.extend(moved, sent.length)
        here.import_blocks(moved.blocks[shared:], away.export_blocks(sent.blocks[shared:]))
        kept = target.export_kv(running.blocks, range(running.length)).data
        require(kept.tobytes() == held.tobytes(), "importing blocks changed those of a sequence that ran beside them")
        right = source.export_kv(sent.blocks, range(sent.length)).data[:, :, shared * size :]
        found = target.export_kv(moved.blocks, range(sent.length)).data[:, :, shared * size :]
        require(found.tobytes() == right.tobytes(), "behind a shared prefix, imported blocks are not what they were")


def native_layout_names_the_form(subject: Subject) -> None:
    """A cache of more blocks has the same name; one of other layers or of another type has another."""
    decoder = subject.spec.decoder
    fewer = replace(subject.spec, decoder=replace(decoder, layers=decoder.layers - 1))
    others: list[dict[str, Any]] = [
        {"kv_cache_dtype": dtype} for dtype in (None, *subject.capabilities.kv_dtypes) if dtype != subject.kv_dtype
    ]
    others += [{"dtype": dtype} for dtype in subject.capabilities.dtypes if dtype != subject.dtype and not dtype.quantised]
    with ExitStack() as stack:
        model, _ = stack.enter_context(_models(subject))
        larger = stack.enter_context(subject.model(kv_cache_bytes=2 * subject.cache_bytes, max_batch_size=4))
        require(larger.kv.native_layout == model.kv.native_layout, "a cache of more blocks has another name")
        found = [stack.enter_context(subject.model(fewer)), *(stack.enter_context(subject.model(**other)) for other in others)]
        for other in found:
            alike = _form(other.kv) == _form(model.kv)
            same = other.kv.native_layout == model.kv.native_layout
            require(alike or not same, f"caches of {_form(other.kv)} and {_form(model.kv)} are both {model.kv.native_layout!r}")


def _form(kv: KvSpec) -> tuple[tuple[int, int, int], str, int]:
    return kv.token_shape, kv.dtype, kv.bytes_per_block


def wrong_native_blocks_are_refused(subject: Subject) -> None:
    """Too many bytes or too few, of another type, or for a block that is not there raise ValueError, and nothing is written."""
    with _models(subject) as (model, native):
        sequence, _ = subject.driver(model).prefill(subject.ids(20))
        blocks, absent = sequence.blocks, model.kv.blocks
        data = native.export_blocks(blocks)
        other = ~data
        refused(lambda: native.export_blocks([*blocks, absent]), "a block that is not there")
        refused(lambda: native.export_blocks([-1]), "a negative block")
        refused(lambda: native.import_blocks(blocks, other[:, :-1]), "a byte too few for each block")
        refused(lambda: native.import_blocks(blocks, np.concatenate((other, other))), "more blocks than were named")
        refused(lambda: native.import_blocks(blocks, other[:-1]), "fewer blocks than were named")
        refused(lambda: native.import_blocks(blocks, other.reshape(-1)), "bytes that are not by block")
        refused(lambda: native.import_blocks(blocks, other.astype(np.float32)), "blocks of floats")
        refused(lambda: native.import_blocks([*blocks[:-1], absent], other), "blocks of which one is not there")
        require(np.array_equal(native.export_blocks(blocks), data), "what was refused was written")


@contextmanager
def _models(subject: Subject) -> Iterator[tuple[GenerativeModel, NativeKv]]:
    """A model, and the same one as one with a native form."""
    with subject.model() as model:
        native = native_kv(model)
        if native is None:
            raise NotApplicable("it has no native form of KV")
        yield model, native
