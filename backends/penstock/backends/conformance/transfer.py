"""Checks of KV that leaves a cache and enters another one of the same backend."""

from __future__ import annotations

import numpy as np

from penstock.backends.conformance.driver import NONE, Piece
from penstock.backends.conformance.refusals import refused
from penstock.backends.conformance.subject import NotApplicable, Subject, assert_close, assert_same_kv, require
from penstock.backends.contract import CANONICAL_DTYPES, KvChunk

__all__ = [
    "exported_kv_is_a_copy",
    "exported_kv_is_canonical",
    "imported_kv_is_used",
    "kv_travels_in_every_type",
    "wrong_transfers_are_refused",
]


def exported_kv_is_canonical(subject: Subject) -> None:
    """[layer, 2, token, kv head, head dim], keys normalised and turned: the numbers that the formulas give."""
    _exports(subject)
    ids = subject.ids(50)
    right = subject.truth(ids).kv
    with subject.model() as model:
        sequence, _ = subject.driver(model).prefill(ids)
        chunk = model.export_kv(sequence.blocks, range(50))
    require(chunk.tokens == range(50), f"tokens {chunk.tokens}, not {range(50)}")
    require(chunk.data.shape == right.shape, f"shape {chunk.data.shape}, not {right.shape}")
    found = chunk.data.astype(np.float64)
    for layer in range(len(right)):
        for kind, name in enumerate(("keys", "values")):
            where = f"{name} of layer {layer}, tokens x heads"
            assert_close(found[layer, kind].reshape(50, -1), right[layer, kind].reshape(50, -1), subject.tolerance, where)


def exported_kv_is_a_copy(subject: Subject) -> None:
    """A part is what the whole has there, and stays so when the blocks are used again."""
    _exports(subject)
    with subject.model() as model:
        driver = subject.driver(model)
        sequence, _ = driver.prefill(subject.ids(50))
        whole = model.export_kv(sequence.blocks, range(50))
        part = model.export_kv(sequence.blocks, range(13, 37))
        require(np.array_equal(part.data, whole.data[:, :, 13:37]), "a part differs from the whole")
        before = whole.data.copy()
        driver.step(Piece(sequence, subject.ids(5), NONE))
        driver.release(sequence)
        driver.prefill(subject.ids(60, 9))
        require(np.array_equal(whole.data, before), "an exported chunk changes when its blocks are used again")


def imported_kv_is_used(subject: Subject) -> None:
    """A sequence whose KV came in pieces from another model, into other blocks, goes on as if it had been computed here."""
    _exports(subject)
    if not subject.capabilities.import_kv:
        raise NotApplicable("it imports no KV")
    ids = subject.ids(50)
    with subject.model() as source, subject.model() as target:
        away, here = subject.driver(source), subject.driver(target, list(reversed(range(target.kv.blocks))))
        sequence, logits = away.prefill(ids)
        moved = here.sequence()
        here.extend(moved, len(ids))
        for tokens in (range(17), range(17, 33), range(33, 50)):
            target.import_kv(moved.blocks, source.export_kv(sequence.blocks, tokens))
        moved.length = len(ids)
        answer, right = away.greedy(sequence, int(logits[-1].argmax()), 16)
        subject.assert_continues(here.follow(moved, answer), right, "behind imported KV")


def kv_travels_in_every_type(subject: Subject) -> None:
    """KV leaves in the type that was told, and comes in as any that travels, rounded to the nearest that the cache holds."""
    _exports(subject)
    with subject.model() as model:
        driver, kv = subject.driver(model), model.kv
        sequence, _ = driver.prefill(subject.ids(40))
        sent = model.export_kv(sequence.blocks, range(40)).data
        own, shape = CANONICAL_DTYPES[kv.canonical_dtype], kv.canonical_shape(40)
        require(sent.dtype == own, f"exports {sent.dtype}, and says {own}")
        require(sent.shape == shape, f"exports {sent.shape}, and says {shape}")
        if not subject.capabilities.import_kv:
            return
        taken = driver.sequence()
        driver.extend(taken, 40)
        for name, dtype in CANONICAL_DTYPES.items():
            given = sent.astype(dtype)
            model.import_kv(taken.blocks, KvChunk(range(40), given))
            found, right = model.export_kv(taken.blocks, range(40)).data, given.astype(own)
            if subject.kv_dtype is None:
                require(np.array_equal(found, right), f"what came in as {name} is not the nearest {own} to it")
            else:
                assert_same_kv(found, right, f"that came in as {name}")
        kept = model.export_kv(taken.blocks, range(40)).data
        for wrong in (np.float64, np.int8, np.uint16):
            refused(lambda: model.import_kv(taken.blocks, KvChunk(range(40), np.ones(shape, wrong))), f"KV of {wrong.__name__}")  # noqa: B023
        require(np.array_equal(model.export_kv(taken.blocks, range(40)).data, kept), "what was refused was written")


def wrong_transfers_are_refused(subject: Subject) -> None:
    """Positions, blocks and shapes that do not fit raise ValueError before anything is written."""
    _exports(subject)
    with subject.model() as model:
        driver = subject.driver(model)
        sequence, _ = driver.prefill(subject.ids(20))
        size, chunk = model.kv.block_size, model.export_kv(sequence.blocks, range(20))
        held = len(sequence.blocks) * size
        refused(lambda: model.export_kv(sequence.blocks, range(held + 1)), "more tokens than the blocks hold")
        refused(lambda: model.export_kv([model.kv.blocks], range(1)), "a block that is not there")
        refused(lambda: model.export_kv([-1], range(1)), "a negative block")
        if not subject.capabilities.import_kv:
            return
        longer, beyond = KvChunk(range(21), chunk.data), KvChunk(range(held, held + 20), chunk.data)
        more_layers = KvChunk(range(20), np.concatenate((chunk.data, chunk.data)))
        absent = [model.kv.blocks] * len(sequence.blocks)
        refused(lambda: model.import_kv(sequence.blocks, longer), "a chunk of fewer tokens than it says")
        refused(lambda: model.import_kv(sequence.blocks, beyond), "a chunk beyond the blocks")
        refused(lambda: model.import_kv(sequence.blocks, more_layers), "a chunk of another model's layers")
        refused(lambda: model.import_kv(absent, chunk), "a chunk for a block that is not there")
        require(np.array_equal(model.export_kv(sequence.blocks, range(20)).data, chunk.data), "what was refused was written")


def _exports(subject: Subject) -> None:
    if not subject.capabilities.export_kv:
        raise NotApplicable("it exports no KV")
