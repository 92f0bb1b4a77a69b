"""The conformance suite: every check by name, the subjects to hold them against, and a runner.

Another project's backend runs it with ``python -m penstock.backends.conformance NAME``, or under pytest::

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
    def test_my_backend(check, tmp_path):
        for subject in subjects(REGISTRATION, tmp_path):
            check(subject)

A check returns, raises AssertionError, or raises `NotApplicable` where the backend does not claim what it is about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from penstock.backends.conformance import lifecycle, logits, transfer
from penstock.backends.conformance.checkpoints import CONFIGS, write_checkpoint
from penstock.backends.conformance.subject import Subject
from penstock.backends.contract import DType, Registration, Unsupported

__all__ = ["CHECKS", "Check", "subjects"]

Check = Callable[[Subject], None]

CHECKS: Mapping[str, Check] = {name: getattr(module, name) for module in (logits, transfer, lifecycle) for name in module.__all__}
"""Every check, by its name."""


def subjects(
    registration: Registration, folder: Path, *, families: tuple[str, ...] = tuple(CONFIGS), dtype: DType | None = None
) -> Iterator[Subject]:
    """A backend with a small random model of each family that it can run.

    Args:
        registration: the backend.
        folder: where the checkpoints are written, or were by an earlier call.
        families: names of `CONFIGS`.
        dtype: of the models; None: float32 where the backend has it, else what it prefers.
    """
    for family in families:
        spec = write_checkpoint(folder / family, CONFIGS[family])
        other = write_checkpoint(folder / f"{family}-other", CONFIGS[family], seed=1)
        capabilities = registration.capabilities(spec)
        if isinstance(capabilities, Unsupported):
            continue
        exact = DType.F32 if DType.F32 in capabilities.dtypes else capabilities.dtypes[0]
        yield Subject(registration, capabilities, spec, other, dtype or exact, computes=registration.name != "fake")
