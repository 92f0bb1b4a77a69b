"""Checks of a model's life: what it says of itself, what it gives back, and who else lives in the process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from penstock.backends.conformance.driver import Piece
from penstock.backends.conformance.subject import NotApplicable, Subject, require
from penstock.backends.contract import GenerativeModel, ModelSpec

__all__ = [
    "a_failed_start_leaves_nothing",
    "closing_twice_is_harmless",
    "eight_threads_step_two_models",
    "it_keeps_within_its_memory",
    "two_models_do_not_meet",
]


def it_keeps_within_its_memory(subject: Subject) -> None:
    """The cache is no larger than the operator allows and no smaller than it could be; the rest of what it says holds too."""
    with subject.model(kv_cache_bytes=1 << 20) as model:
        kv = model.kv
        require(kv.block_size > 0, f"blocks of {kv.block_size} tokens")
        require(0 < kv.blocks * kv.bytes_per_block <= 1 << 20, f"{kv.blocks} blocks of {kv.bytes_per_block} bytes within a MiB")
        require((kv.blocks + 2) * kv.bytes_per_block > 1 << 20, "two blocks more would fit")
        require(model.dtype == subject.dtype, f"it was to be {subject.dtype} and is {model.dtype}")
        require(bool(model.device and kv.layout and kv.dtype), "device, layout and type of the cache have names")


def closing_twice_is_harmless(subject: Subject) -> None:
    """`close` is idempotent, and a step behind it raises instead of touching memory that is gone."""
    with subject.model() as model:
        driver = subject.driver(model)
        driver.step(Piece(driver.sequence(), subject.ids(3)))
        model.close()
        model.close()
        try:
            driver.step(Piece(driver.sequence(), subject.ids(3)))
        except Exception:  # noqa: BLE001  the contract leaves the type open
            return
        raise AssertionError("a closed model computed a step")


def a_failed_start_leaves_nothing(subject: Subject) -> None:
    """A checkpoint whose weights are gone raises, and the next start is none the worse."""
    if not subject.computes:
        raise NotApplicable("it reads no weights")
    broken = replace(subject.spec, shards=(Path("not there.safetensors"),))
    made = True
    try:
        with subject.model(broken):
            pass
    except Exception:  # noqa: BLE001  the contract leaves the type open
        made = False
    require(not made, "a model without its weights was made")
    with subject.model() as model:
        require(bool(np.isfinite(subject.driver(model).prefill(subject.ids(5))[1]).all()), "logits after a failed start")


def two_models_do_not_meet(subject: Subject) -> None:
    """Two models stepped in turn give what each gives alone."""
    ids = subject.ids(12)
    right = [_decode(subject, spec, ids) for spec in (subject.spec, subject.other)]
    with subject.model() as first, subject.model(subject.other) as second:
        drivers = subject.driver(first), subject.driver(second)
        sequences = [driver.sequence() for driver in drivers]
        for i, token in enumerate(ids):
            for which, (driver, sequence) in enumerate(zip(drivers, sequences, strict=True)):
                (found,) = driver.step(Piece(sequence, [token]))
                subject.assert_close(found, right[which][i : i + 1], f"model {which}, step {i}")


def eight_threads_step_two_models(subject: Subject) -> None:
    """Steps of one model come one at a time but from any thread, and two models step at the same time."""
    prompts = [subject.ids(12, seed) for seed in range(8)]
    with subject.model() as first, subject.model(subject.other) as second:
        models = first, second
        locks = threading.Lock(), threading.Lock()
        right = [[_alone(subject, model, ids) for ids in prompts] for model in models]
        drivers = [subject.driver(model) for model in models]

        def run(which: int, ids: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            sequence, found = drivers[which].sequence(), []
            for token in ids:
                with locks[which]:
                    found += drivers[which].step(Piece(sequence, [token]))
            return np.concatenate(found)

        with ThreadPoolExecutor(8) as pool:
            futures = [pool.submit(run, i % 2, ids) for i, ids in enumerate(prompts)]
            for i, future in enumerate(futures):
                subject.assert_close(future.result(), right[i % 2][i], f"thread {i}")


def _decode(subject: Subject, spec: ModelSpec, ids: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    with subject.model(spec) as model:
        return _alone(subject, model, ids)


def _alone(subject: Subject, model: GenerativeModel, ids: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Logits behind each token, one token a step, in blocks that are then free again."""
    driver = subject.driver(model)
    sequence = driver.sequence()
    return np.concatenate([driver.step(Piece(sequence, [token]))[0] for token in ids])
