"""Holds a backend against the suite and tells of each check whether it passed, failed or did not apply, and why."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path

from penstock.backends.checkpoint import read_model
from penstock.backends.conformance.across import PAIR_CHECKS, Pair
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.subject import NotApplicable, Subject
from penstock.backends.conformance.suite import CHECKS, make_subject, subjects
from penstock.backends.contract import Available, DType, ModelSpec, Registration, Unsupported
from penstock.backends.registry import backends
from penstock.common.service import StartError
from penstock.common.sources import resolve

__all__ = ["Outcome", "Result", "run"]


class Outcome(StrEnum):
    """What became of a check. Skipped: the backend does not claim what it is about."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Result:
    """A check that was run.

    Attributes:
        kv_dtype: of its cache; None: the type that the backend computes with.
        model: the family of the suite's own checkpoint, or the name of the folder or model that was given.
        about: what a backend that passes does.
        reason: why it failed or was skipped; empty where it passed.
        seconds: that it took.
    """

    backend: str
    dtype: DType
    kv_dtype: DType | None
    model: str
    check: str
    about: str
    outcome: Outcome
    reason: str
    seconds: float


def run(
    name: str,
    *,
    model: str | None = None,
    dtype: DType | None = None,
    kv_dtype: DType | None = None,
    against: str | None = None,
    checks: tuple[str, ...] = (),
) -> Iterator[Result]:
    """Run the suite, one result at a time.

    Args:
        name: the backend's.
        model: a checkpoint to run it with: a folder, ``builtin`` or a Hugging Face id; None: a small one of each family,
            written for the purpose.
        dtype: None: float32 where the backend has it, else what it prefers.
        kv_dtype: of the KV cache; None: the type that the backend computes with.
        against: another backend, to compare answers with and to exchange KV with, both ways.
        checks: names of those to run; none: all.

    Raises:
        StartError: there is no such backend, check or checkpoint, or the backend does not run here or runs no model of these.
    """
    known = [*CHECKS, *PAIR_CHECKS]
    if unknown := [check for check in checks if check not in known]:
        raise StartError(f"there is no check {unknown[0]}; there are {', '.join(known)}")
    chosen = set(checks or known)
    if against is None and (pairs := sorted(chosen & set(checks) & PAIR_CHECKS.keys())):
        raise StartError(f"check {pairs[0]} compares two backends; name the other one with --against")
    first, second = _available(name), None if against is None else _available(against)
    with tempfile.TemporaryDirectory() as folder:
        if model is None:
            found = subjects(first, Path(folder), dtype=dtype, kv_dtype=kv_dtype)
        else:
            found = iter([make_subject(first, *_checkpoints(model, Path(folder)), dtype, kv_dtype)])
        reasons = []
        for subject in found:
            if isinstance(subject, Unsupported):
                reasons.append(subject.reason)
                continue
            yield from _hold(subject, chosen)
            if second is not None:
                yield from _compare(subject, second, chosen)
    if len(reasons) == (len(CONFIGS) if model is None else 1):
        raise StartError(f"{name} runs none of the models: {'; '.join(dict.fromkeys(reasons))}")


def _available(name: str) -> Registration:
    known = backends()
    if name not in known:
        raise StartError(f"there is no backend {name}; there are {', '.join(known)}")
    availability = known[name].probe()
    if not isinstance(availability, Available):
        raise StartError(f"backend {name} does not run here: {availability.reason}")
    return known[name]


def _checkpoints(model: str, folder: Path) -> tuple[ModelSpec, ModelSpec]:
    """A checkpoint that somebody has, and a small one that knows the same tokens."""
    found = resolve(model)
    spec = read_model(found, found.name if Path(model).expanduser().is_dir() else model)
    family = CONFIGS[spec.decoder.architecture]
    return spec, write_checkpoint(folder / "other", {**family, "vocab_size": spec.decoder.vocabulary_size}, seed=1)


def _hold(subject: Subject, chosen: set[str]) -> Iterator[Result]:
    for name, check in CHECKS.items():
        if name in chosen:
            yield _result(subject, name, check.__doc__, partial(check, subject))


def _compare(subject: Subject, registration: Registration, chosen: set[str]) -> Iterator[Result]:
    """Both ways: with KV of the first in the second, and of the second in the first."""
    other = make_subject(registration, subject.spec, subject.other, subject.dtype)
    for name, check in PAIR_CHECKS.items():
        if name not in chosen:
            continue
        if isinstance(other, Unsupported):
            why = f"{registration.name}: {other.reason}"
            yield _result(subject, f"{name} ({registration.name})", check.__doc__, partial(_skip, why))
            continue
        for pair in (Pair(subject, other), Pair(other, subject)):
            way = f"{name} ({pair.source.registration.name} to {pair.target.registration.name})"
            yield _result(subject, way, check.__doc__, partial(check, pair))


def _skip(reason: str) -> None:
    raise NotApplicable(reason)


def _result(subject: Subject, name: str, about: str | None, check: Callable[[], None]) -> Result:
    outcome, reason, start = Outcome.PASSED, "", time.perf_counter()
    try:
        check()
    except NotApplicable as told:
        outcome, reason = Outcome.SKIPPED, str(told)
    except AssertionError as error:
        outcome, reason = Outcome.FAILED, str(error)
    except Exception as error:  # noqa: BLE001  whatever a backend raises is its failure, and the next check runs
        outcome, reason = Outcome.FAILED, f"{type(error).__name__}: {error}"
    return Result(
        backend=subject.registration.name,
        dtype=subject.dtype,
        kv_dtype=subject.kv_dtype,
        model=subject.spec.name,
        check=name,
        about=" ".join((about or "").split()),
        outcome=outcome,
        reason=" ".join(reason.split()),
        seconds=time.perf_counter() - start,
    )
