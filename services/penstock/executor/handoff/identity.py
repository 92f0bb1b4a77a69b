"""What an executor says of itself to another one before they exchange KV."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Identity"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Of this executor.

    Attributes:
        model_fingerprint: of another model, or version, no KV is taken.
        secret: see `penstock.common.proofs`.
    """

    executor_id: str
    model_fingerprint: str
    native_layout: str
    secret: bytes = field(repr=False)
