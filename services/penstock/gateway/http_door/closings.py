"""How a call's prompts ran: an extension of OpenAI's answers, with the names of `penstock.client.Closing`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.gateway.answer import Closing, Handoff

__all__ = ["closings"]

_DIGITS = 6


def closings(closings: Sequence[Closing]) -> list[dict[str, Any]]:
    """One object for each prompt."""
    return [_closing(one) for one in closings]


def _closing(closing: Closing) -> dict[str, Any]:
    return {
        "executor_ids": list(closing.executor_ids),
        "prefill_executor_id": closing.prefill_executor_id,
        "decode_executor_id": closing.decode_executor_id,
        "placement_reason": closing.placement_reason.value,
        "handoff": _handoff(closing.handoff) if closing.handoff is not None else None,
        "fallback": closing.fallback.value,
        "fallback_reason": closing.fallback_reason.value if closing.fallback_reason is not None else "",
        "encode_seconds": round(closing.encode_seconds, _DIGITS),
        "queue_seconds": round(closing.queue_seconds, _DIGITS),
        "prefill_seconds": round(closing.prefill_seconds, _DIGITS),
        "first_token_seconds": round(closing.first_token_seconds, _DIGITS),
        "first_text_seconds": round(closing.first_text_seconds, _DIGITS),
        "first_step_seconds": round(closing.first_step_seconds, _DIGITS),
        "decode_seconds": round(closing.decode_seconds, _DIGITS),
        "total_seconds": round(closing.total_seconds, _DIGITS),
        "replacements": closing.replacements,
        "preemptions": closing.preemptions,
        "seed": closing.seed,
    }


def _handoff(handoff: Handoff) -> dict[str, Any]:
    return {
        "kv_bytes": handoff.kv_bytes,
        "transfer_seconds": round(handoff.transfer_seconds, _DIGITS),
        "exposed_seconds": round(handoff.exposed_seconds, _DIGITS),
        "transport": handoff.transport,
        "native": handoff.native,
    }
