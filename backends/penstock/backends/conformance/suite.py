"""The conformance suite: every check by name, and the subjects to hold them against.

Another project's backend runs it with ``penstock conformance NAME``, or under pytest::

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
    def test_my_backend(check, tmp_path):
        for subject in subjects(REGISTRATION, tmp_path, families=("llama",)):
            check(subject)

A check returns, raises AssertionError, or raises `NotApplicable` where the backend does not claim what it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from penstock.backends.conformance import concurrency, leaks, lifecycle, limits, logits, native, paging, top, transfer
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.subject import Subject
from penstock.backends.contract import DType, ModelSpec, Registration, Unsupported

__all__ = ["CHECKS", "Check", "make_subject", "subjects"]

Check = Callable[[Subject], None]

# Answers that no model gives.
_MADE_UP = frozenset({"fake"})
_ROOMS = (logits, top, paging, transfer, native, limits, lifecycle, concurrency, leaks)

CHECKS: Mapping[str, Check] = {name: getattr(module, name) for module in _ROOMS for name in module.__all__}
"""Every check of one backend, by its name."""


def subjects(
    registration: Registration,
    folder: Path,
    *,
    families: tuple[str, ...] = tuple(CONFIGS),
    dtype: DType | None = None,
    kv_dtype: DType | None = None,
) -> Iterator[Subject | Unsupported]:
    """A backend with a small random model of each family, or why it does not run it.

    Args:
        registration: the backend.
        folder: where the checkpoints are written, or were by an earlier call.
        families: names of `CONFIGS`.
        dtype: of the models; None: float32 where the backend has it, else what it prefers.
        kv_dtype: of their caches; None: the type that the backend computes with.
    """
    for family in families:
        spec = write_checkpoint(folder / family, CONFIGS[family])
        other = write_checkpoint(folder / f"{family}-other", CONFIGS[family], seed=1)
        yield make_subject(registration, spec, other, dtype, kv_dtype)


def make_subject(
    registration: Registration, spec: ModelSpec, other: ModelSpec, dtype: DType | None = None, kv_dtype: DType | None = None
) -> Subject | Unsupported:
    """A backend with one model, or why it does not run it.

    Args:
        registration: the backend.
        spec: the model.
        other: one with other weights that knows the same tokens.
        dtype: None: float32 where the backend has it, else what it prefers.
        kv_dtype: of its cache; None: the type that the backend computes with.
    """
    capabilities, others = registration.capabilities(spec), registration.capabilities(other)
    if isinstance(capabilities, Unsupported):
        return Unsupported(f"{spec.name}: {capabilities.reason}")
    if isinstance(others, Unsupported):
        return Unsupported(f"{other.name}: {others.reason}")
    if dtype is not None and dtype not in capabilities.dtypes:
        return Unsupported(f"has no {dtype} for {spec.name}, but {', '.join(capabilities.dtypes)}")
    if kv_dtype is not None and kv_dtype not in capabilities.kv_dtypes:
        return Unsupported(f"has no KV cache of {kv_dtype} for {spec.name}")
    exact = DType.F32 if DType.F32 in capabilities.dtypes else capabilities.dtypes[0]
    return Subject(registration, capabilities, spec, other, dtype or exact, kv_dtype, computes=registration.name not in _MADE_UP)
