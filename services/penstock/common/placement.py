"""Why a request runs on one executor, or its prefill on another: the scheduler says it, the gateway passes it on."""

from __future__ import annotations

import enum

__all__ = ["PlacementReason"]


class PlacementReason(enum.Enum):
    """By the names of `penstock.v1.PlacementReason`. `UNSPECIFIED`: a scheduler of another version has one of its own."""

    UNSPECIFIED = "unspecified"
    POLICY = "policy"
    COST = "cost"
    NO_PREFILL_EXECUTOR = "no_prefill_executor"
    NO_DECODE_EXECUTOR = "no_decode_executor"
    ONE_TOKEN = "one_token"  # noqa: S105 - of an answer
    CACHED = "cached"
    INCOMPATIBLE = "incompatible"
    REPLACED = "replaced"
    UNREACHABLE = "unreachable"
