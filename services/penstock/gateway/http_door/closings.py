"""How a call's prompts ran: an extension of OpenAI's answers, with the names of `penstock.client.Closing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.gateway.answer import Closing, Handoff

__all__ = ["closings"]

_DIGITS = 6


def closings(told: Sequence[Closing]) -> list[dict[str, Any]]:
    """One object for each prompt."""
    return [_closing(one) for one in told]


def _closing(told: Closing) -> dict[str, Any]:
    return {
        "executor_ids": list(told.executor_ids),
        "prefill_executor_id": told.prefill_executor_id,
        "decode_executor_id": told.decode_executor_id,
        "placement_reason": told.placement_reason.value,
        "handoff": _handoff(told.handoff) if told.handoff is not None else None,
        "fallback": told.fallback.value,
        "fallback_reason": told.fallback_reason.value if told.fallback_reason is not None else "",
        "encode_seconds": round(told.encode_seconds, _DIGITS),
        "queue_seconds": round(told.queue_seconds, _DIGITS),
        "prefill_seconds": round(told.prefill_seconds, _DIGITS),
        "first_token_seconds": round(told.first_token_seconds, _DIGITS),
        "first_text_seconds": round(told.first_text_seconds, _DIGITS),
        "first_step_seconds": round(told.first_step_seconds, _DIGITS),
        "decode_seconds": round(told.decode_seconds, _DIGITS),
        "total_seconds": round(told.total_seconds, _DIGITS),
        "replacements": told.replacements,
        "preemptions": told.preemptions,
        "seed": told.seed,
    }


def _handoff(told: Handoff) -> dict[str, Any]:
    return {
        "kv_bytes": told.kv_bytes,
        "transfer_seconds": round(told.transfer_seconds, _DIGITS),
        "exposed_seconds": round(told.exposed_seconds, _DIGITS),
        "transport": told.transport,
        "native": told.native,
    }
