"""Checks of KV that leaves a cache and enters another."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from penstock.backends.conformance.driver import NONE, Piece
from penstock.backends.conformance.subject import NotApplicable, Subject, require
from penstock.backends.contract import KvChunk

__all__ = ["exported_kv_is_canonical", "imported_kv_is_used", "wrong_transfers_are_refused"]


def exported_kv_is_canonical(subject: Subject) -> None:
    """[layer, 2, token, kv head, head dim], and a part is what the whole has there."""
    if not subject.capabilities.export_kv:
        raise NotApplicable("it exports no KV")
    decoder = subject.spec.decoder
    with subject.model() as model:
        driver = subject.driver(model)
        sequence, _ = driver.prefill(subject.ids(50))
        whole = model.export_kv(sequence.blocks, range(50))
        expected = (decoder.layers, 2, 50, decoder.kv_heads, decoder.head_dim)
        right = whole.data.shape == expected or not subject.computes
        require(whole.tokens == range(50) and right, f"{whole.tokens} {whole.data.shape}, not {expected}")
        part = model.export_kv(sequence.blocks, range(13, 37))
        require(np.array_equal(part.data, whole.data[:, :, 13:37]), "a part differs from the whole")
        before = whole.data.copy()
        driver.step(Piece(sequence, subject.ids(5), NONE))
        driver.release(sequence)
        driver.prefill(subject.ids(60, 9))
        require(np.array_equal(whole.data, before), "an exported chunk changes when its blocks are used again")


def imported_kv_is_used(subject: Subject) -> None:
    """A sequence whose KV came in pieces from another model, into other blocks, goes on as if it had been computed here."""
    if not (subject.capabilities.export_kv and subject.capabilities.import_kv):
        raise NotApplicable("it does not both export and import KV")
    ids, tail = subject.ids(50), subject.ids(6, 1)
    with subject.model() as source, subject.model() as target:
        away, right_order = subject.driver(source), list(reversed(range(target.kv.blocks)))
        sequence, _ = away.prefill(ids)
        here = subject.driver(target, right_order)
        moved = here.sequence()
        here.extend(moved, len(ids))
        for tokens in (range(17), range(17, 33), range(33, 50)):
            target.import_kv(moved.blocks, source.export_kv(sequence.blocks, tokens))
        moved.length = len(ids)
        for i, token in enumerate(tail):
            (right,), (found,) = away.step(Piece(sequence, [token])), here.step(Piece(moved, [token]))
            subject.assert_close(found, right, f"token {i} behind imported KV")


def wrong_transfers_are_refused(subject: Subject) -> None:
    """Positions, blocks and shapes that do not fit raise ValueError before anything is written."""
    if not subject.capabilities.export_kv:
        raise NotApplicable("it exports no KV")
    with subject.model() as model:
        driver = subject.driver(model)
        sequence, _ = driver.prefill(subject.ids(20))
        size, chunk = model.kv.block_size, model.export_kv(sequence.blocks, range(20))
        held = len(sequence.blocks) * size
        _refused(lambda: model.export_kv(sequence.blocks, range(held + 1)), "more tokens than the blocks hold")
        _refused(lambda: model.export_kv([model.kv.blocks], range(1)), "a block that is not there")
        _refused(lambda: model.export_kv([-1], range(1)), "a negative block")
        if subject.capabilities.import_kv:
            longer, beyond = KvChunk(range(21), chunk.data), KvChunk(range(held, held + 20), chunk.data)
            absent = [model.kv.blocks] * len(sequence.blocks)
            _refused(lambda: model.import_kv(sequence.blocks, longer), "a chunk of fewer tokens than it says")
            _refused(lambda: model.import_kv(sequence.blocks, beyond), "a chunk beyond the blocks")
            _refused(lambda: model.import_kv(absent, chunk), "a chunk for a block that is not there")
            require(np.array_equal(model.export_kv(sequence.blocks, range(20)).data, chunk.data), "what was refused was written")


def _refused(call: Callable[[], object], what: str) -> None:
    try:
        call()
    except ValueError:
        return
    raise AssertionError(f"{what} was not refused with a ValueError")
