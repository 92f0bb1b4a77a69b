"""What a check is given: a backend, a model for it, and how near to the truth its numbers have to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.backends.conformance.driver import Driver
from penstock.backends.contract import Capabilities, DeviceConfig, DType, GenerativeModel, ModelSpec, Registration

__all__ = ["NotApplicable", "Subject", "require"]

# Root-mean-square error over the root mean square of what is right.
_TOLERANCE: Mapping[DType, float] = {DType.F32: 1e-3, DType.BF16: 5e-2, DType.INT8: 1e-1, DType.INT4: 5e-1}
_CACHE_BYTES = 4 << 20


class NotApplicable(Exception):
    """The backend does not claim what a check is about."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A backend and a model that it can run.

    Attributes:
        dtype: of the models that the checks make.
        other: a checkpoint of the same shape with other weights.
        computes: whether logits are the model's; False for one that makes them up, which is held to agree with itself alone.
    """

    registration: Registration
    capabilities: Capabilities
    spec: ModelSpec
    other: ModelSpec
    dtype: DType
    computes: bool = True

    @contextmanager
    def model(self, spec: ModelSpec | None = None, **settings: Any) -> Iterator[GenerativeModel]:
        """A model of a few megabytes of cache and one thread, which suits its size, unless `settings` say otherwise."""
        small = DeviceConfig(dtype=self.dtype, threads=1, kv_cache_bytes=_CACHE_BYTES, max_batch_tokens=256, max_batch_size=8)
        model = self.registration.create(spec or self.spec, replace(small, **settings))
        try:
            yield model
        finally:
            model.close()

    def driver(self, model: GenerativeModel, order: Sequence[int] | None = None) -> Driver:
        """A driver of one of its models."""
        return Driver(model, order, prompt_logits=self.capabilities.prompt_logits)

    def ids(self, count: int, seed: int = 0) -> list[int]:
        """Token ids of the model's vocabulary, drawn from a seed."""
        ids: list[int] = np.random.default_rng(seed).integers(0, self.spec.decoder.vocabulary_size, count).tolist()
        return ids

    def assert_close(self, found: NDArray[Any], right: NDArray[Any], what: str) -> None:
        """Raise AssertionError unless these logits or KV are the same within what the type allows."""
        _close_to(found, right, _TOLERANCE[self.dtype], what)


def require(condition: bool, what: str) -> None:
    """Raise AssertionError with `what` is wrong unless the condition holds; unlike ``assert``, also under ``python -O``."""
    if not condition:
        raise AssertionError(what)


def _close_to(found: NDArray[Any], right: NDArray[Any], tolerance: float, what: str) -> None:
    """The error of each row, as a root mean square, must be at most `tolerance` of the right row's."""
    require(found.shape == right.shape, f"{what}: shape {found.shape}, expected {right.shape}")
    truth = right.astype(np.float64)
    size = np.maximum(np.sqrt(np.mean(truth**2, -1)), 1e-9)
    error = np.sqrt(np.mean((found - truth) ** 2, -1)) / size
    if not (error <= tolerance).all():  # a NaN fails too
        worst = np.argmax(np.where(np.isnan(error), np.inf, error))
        raise AssertionError(f"{what}: row {worst} is off by {error.flat[worst]:.2g} of its size; {tolerance:.2g} is allowed")
