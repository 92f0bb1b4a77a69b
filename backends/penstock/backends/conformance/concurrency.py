"""Checks of many models and many threads: calls to one model never overlap, calls to different ones do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from penstock.backends.conformance.driver import Piece
from penstock.backends.conformance.subject import Subject
from penstock.backends.contract import ModelSpec

__all__ = ["eight_models_run_at_once", "eight_threads_share_a_model", "two_models_do_not_meet"]

_THREADS = 8
_TIMEOUT = 120.0


def two_models_do_not_meet(subject: Subject) -> None:
    """Two models stepped in turn, token by token, give what each gives alone."""
    ids = subject.ids(12)
    right = [_alone(subject, spec, ids) for spec in (subject.spec, subject.other)]
    with subject.model() as first, subject.model(subject.other) as second:
        drivers = subject.driver(first), subject.driver(second)
        sequences = [driver.sequence() for driver in drivers]
        for i, token in enumerate(ids):
            for which, (driver, sequence) in enumerate(zip(drivers, sequences, strict=True)):
                (found,) = driver.step(Piece(sequence, [token]))
                subject.assert_close(found, right[which][i : i + 1], f"model {which}, step {i}")


def eight_threads_share_a_model(subject: Subject) -> None:
    """Steps of one model that never overlap may each come from another thread."""
    prompts = [subject.ids(10, seed) for seed in range(_THREADS)]
    with subject.model() as model, ThreadPoolExecutor(_THREADS) as pool:
        driver = subject.driver(model)
        right = [driver.logits(ids)[-1:] for ids in prompts]
        sequences = [driver.sequence() for _ in prompts]
        together, turn = threading.Barrier(_THREADS), threading.Lock()

        def run(which: int) -> NDArray[np.float32]:
            found = np.empty((0, 0), np.float32)
            for token in prompts[which]:
                together.wait(_TIMEOUT)  # so that each step comes from another thread than the one before
                with turn:
                    (found,) = driver.step(Piece(sequences[which], [token]))
            return found

        for which, found in enumerate(pool.map(run, range(_THREADS))):
            subject.assert_close(found, right[which], f"thread {which}")


def eight_models_run_at_once(subject: Subject) -> None:
    """Eight models are created, stepped and closed by eight threads at the same time, each as if it were alone."""
    specs = [subject.spec, *[subject.other] * (_THREADS - 1)]
    prompts = [subject.ids(24, seed) for seed in range(_THREADS)]
    right = [_alone(subject, spec, ids) for spec, ids in zip(specs, prompts, strict=True)]
    created, stepped = threading.Barrier(_THREADS), threading.Barrier(_THREADS)

    def run(which: int) -> NDArray[np.float32]:
        try:
            with subject.model(specs[which]) as model:
                driver = subject.driver(model)
                sequence = driver.sequence()
                created.wait(_TIMEOUT)
                found = driver.follow(sequence, prompts[which])
                stepped.wait(_TIMEOUT)
                return found
        except BaseException:
            created.abort()  # the others would wait for this one
            stepped.abort()
            raise

    with ThreadPoolExecutor(_THREADS) as pool:
        futures = [pool.submit(run, which) for which in range(_THREADS)]
    failures = [error for future in futures if (error := future.exception()) is not None]
    for error in failures:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    for which, future in enumerate(futures):
        subject.assert_close(future.result(), right[which], f"model {which}")


def _alone(subject: Subject, spec: ModelSpec, ids: list[int]) -> NDArray[np.float32]:
    """Logits behind each token, one token a step."""
    with subject.model(spec) as model:
        driver = subject.driver(model)
        return driver.follow(driver.sequence(), ids)
