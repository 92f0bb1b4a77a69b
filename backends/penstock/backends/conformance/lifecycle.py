"""Checks of a model's life: what a start that failed and a `close` leave behind."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from penstock.backends.conformance.driver import Piece
from penstock.backends.conformance.refusals import refused
from penstock.backends.conformance.subject import NotApplicable, Subject
from penstock.backends.contract import ModelSpec

__all__ = ["closing_twice_is_harmless", "failed_starts_hurt_nobody"]


def closing_twice_is_harmless(subject: Subject) -> None:
    """`close` is idempotent; what is asked of the model behind it raises instead of touching memory that is gone."""
    with subject.model() as model:
        driver = subject.driver(model)
        sequence, _ = driver.prefill(subject.ids(3))
        model.close()
        model.close()
        refused(lambda: driver.step(Piece(driver.sequence(), subject.ids(3))), "a step of a closed model", Exception)
        if subject.capabilities.export_kv:
            refused(lambda: model.export_kv(sequence.blocks, range(3)), "an export of a closed model", Exception)


def failed_starts_hurt_nobody(subject: Subject) -> None:
    """Absent weights and a cache that holds nothing raise; a model that runs beside goes on, and the next one starts."""
    if not subject.computes:
        raise NotApplicable("it reads no weights")
    ids, more = subject.ids(12), subject.ids(4, 1)
    with subject.model() as running:
        driver = subject.driver(running)
        right = driver.logits(ids + more)[-1:]
        sequence, _ = driver.prefill(ids)
        absent = replace(subject.spec, shards=(Path("not there.safetensors"),))
        refused(partial(_start, subject, absent), "a checkpoint whose weights are not there", Exception)
        refused(partial(_start, subject, subject.spec, kv_cache_bytes=1), "a KV cache of one byte", Exception)
        subject.assert_close(driver.step(Piece(sequence, more))[0][-1:], right, "a model that ran beside failed starts")
    with subject.model() as model:
        subject.assert_close(subject.driver(model).logits(ids + more)[-1:], right, "the next model")


def _start(subject: Subject, spec: ModelSpec, **settings: int) -> None:
    with subject.model(spec, **settings) as model:
        subject.driver(model).logits(subject.ids(3))
