"""What a check is given: a backend, a model for it, and how near to the truth its numbers have to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.backends.conformance.driver import Driver
from penstock.backends.conformance.reference import Truth, reference
from penstock.backends.contract import Capabilities, DeviceConfig, DType, GenerativeModel, ModelSpec, Registration
from penstock.backends.safetensors import Weights

__all__ = ["NotApplicable", "Subject", "assert_close", "assert_same_choices", "assert_same_kv", "require"]

# Root-mean-square error over the root mean square of what is right.
_TOLERANCE: Mapping[DType, float] = {DType.F32: 1e-3, DType.BF16: 5e-2, DType.INT8: 1e-1, DType.INT4: 5e-1}
# What a cache of fewer bits adds.
_KV_TOLERANCE: Mapping[DType | None, float] = {None: 0.0, DType.INT8: 2e-2}
# What KV may lose where it goes into a cache of fewer bits and comes out again.
_ROUND_TRIP = 2e-2
_LONGEST_CONTEXT = 512
_CACHE_TOKENS = 4096
# A choice between two logits that are nearer than this many times their allowed error may go either way.
_CLEAR = 4.0


class NotApplicable(Exception):
    """The backend does not claim what a check is about."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A backend and a model that it can run.

    Attributes:
        dtype: of the models that the checks make.
        other: a checkpoint of the same vocabulary with other weights.
        kv_dtype: of their caches; None: the type that the backend computes with.
        computes: whether logits are the model's; False for one that makes them up, which is held to agree with itself alone.
    """

    registration: Registration
    capabilities: Capabilities
    spec: ModelSpec
    other: ModelSpec
    dtype: DType
    kv_dtype: DType | None = None
    computes: bool = True

    @property
    def context(self) -> int:
        """Tokens that a sequence of the checks holds at most."""
        return min(_LONGEST_CONTEXT, self.spec.decoder.context_length, self.capabilities.max_context or _LONGEST_CONTEXT)

    @property
    def cache_bytes(self) -> int:
        """Of the cache of a model that the checks make: enough for some thousand tokens in float32."""
        decoder = self.spec.decoder
        return _CACHE_TOKENS * decoder.layers * 2 * decoder.kv_heads * decoder.head_dim * 4

    @property
    def tolerance(self) -> float:
        """Root-mean-square error of a row over the row's own, that its types allow against the formulas."""
        return _TOLERANCE[self.dtype] + _KV_TOLERANCE[self.kv_dtype]

    @contextmanager
    def model(self, spec: ModelSpec | None = None, **settings: Any) -> Iterator[GenerativeModel]:
        """A model of a small cache and one thread, which suits its size, unless `settings` say otherwise."""
        model = self.registration.create(spec or self.spec, self.config(**settings))
        try:
            yield model
        finally:
            model.close()

    def config(self, **settings: Any) -> DeviceConfig:
        """What `model` asks for."""
        small = DeviceConfig(
            dtype=self.dtype,
            threads=1,
            kv_cache_bytes=self.cache_bytes,
            kv_cache_dtype=self.kv_dtype,
            max_batch_tokens=256,
            max_batch_size=8,
            max_context=self.context,
        )
        return replace(small, **settings)

    def driver(self, model: GenerativeModel, order: Sequence[int] | None = None) -> Driver:
        """A driver of one of its models."""
        return Driver(model, order, prompt_logits=self.capabilities.prompt_logits)

    def ids(self, count: int, seed: int = 0) -> list[int]:
        """Token ids of the model's vocabulary, drawn from a seed."""
        ids: list[int] = np.random.default_rng(seed).integers(0, self.spec.decoder.vocabulary_size, count).tolist()
        return ids

    def truth(self, ids: Sequence[int]) -> Truth:
        """What the formulas say of these tokens.

        Raises:
            NotApplicable: the backend makes its answers up.
        """
        if not self.computes:
            raise NotApplicable("its logits are made up")
        with Weights(self.spec) as weights:
            return reference(self.spec.decoder, weights, ids)

    def assert_close(self, found: NDArray[Any], right: NDArray[Any], what: str) -> None:
        """Raise AssertionError unless these logits or KV are the same within what the type allows."""
        assert_close(found, right, self.tolerance, what)

    def assert_continues(self, found: NDArray[Any], right: NDArray[Any], what: str) -> None:
        """As `assert_close`, and greedy choices are the same wherever one is clear."""
        assert_close(found, right, self.tolerance, what)
        assert_same_choices(found, right, self.tolerance, what)


def require(condition: bool, what: str) -> None:
    """Raise AssertionError with `what` is wrong unless the condition holds; unlike ``assert``, also under ``python -O``."""
    if not condition:
        raise AssertionError(what)


def assert_close(found: NDArray[Any], right: NDArray[Any], tolerance: float, what: str) -> None:
    """The error of each row, as a root mean square, must be at most `tolerance` of the right row's."""
    require(found.shape == right.shape, f"{what}: shape {found.shape}, expected {right.shape}")
    truth = right.astype(np.float64)
    size = np.maximum(np.sqrt(np.mean(truth**2, -1)), 1e-9)
    error = np.sqrt(np.mean((found - truth) ** 2, -1)) / size
    if not (error <= tolerance).all():  # a NaN fails too
        worst = np.argmax(np.where(np.isnan(error), np.inf, error))
        raise AssertionError(f"{what}: row {worst} is off by {error.flat[worst]:.2g} of its size; {tolerance:.2g} is allowed")


def assert_same_kv(found: NDArray[Any], right: NDArray[Any], what: str) -> None:
    """Keys and values of each token and head must be the same but for what a cache of fewer bits may lose, as `assert_close`."""
    for kind, name in enumerate(("keys", "values")):
        rows = (data[:, kind].astype(np.float64).reshape(-1, data.shape[-1]) for data in (found, right))
        assert_close(next(rows), next(rows), _ROUND_TRIP, f"{name} {what}")


def assert_same_choices(found: NDArray[Any], right: NDArray[Any], tolerance: float, what: str) -> None:
    """The greatest logit of each row must be the same one, wherever it leads by more than the allowed error may take away."""
    best, second = np.sort(right, -1)[:, :-3:-1].T
    clear = best - second > _CLEAR * tolerance * np.sqrt(np.mean(right.astype(np.float64) ** 2, -1))
    chosen, expected = found.argmax(-1), right.argmax(-1)
    wrong = np.flatnonzero(clear & (chosen != expected))
    if wrong.size:
        row = wrong[0]
        raise AssertionError(f"{what}: token {row} is {chosen[row]}, and {expected[row]} is clearly the likeliest")
