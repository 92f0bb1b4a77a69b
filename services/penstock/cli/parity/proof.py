"""What the closing of an answer proves about where it ran."""

from __future__ import annotations

from penstock.client import Closing, Fallback

__all__ = ["fault_apart", "fault_together"]


def fault_together(closing: Closing) -> str:
    """Why this can not be the closing of a request that ran together; empty where it can."""
    if not closing.decode_executor_id or closing.prefill_executor_id != closing.decode_executor_id:
        return f"ran on two executors: {_executors(closing)}"
    if closing.handoff is not None:
        return f"{closing.handoff.kv_bytes} bytes of KV were handed over"
    return ""


def fault_apart(closing: Closing, *, must: bool) -> str:
    """Why this can not be the closing of a request of a cluster that runs apart; empty where it can.

    Args:
        closing: of the request.
        must: whether it had to run apart: a request of one token, or one whose prompt is cached, need not.
    """
    if closing.fallback not in {Fallback.NONE, Fallback.UNSPECIFIED}:
        return f"fell back: {closing.fallback} ({closing.fallback_reason})"
    if closing.handoff is None:
        if must:
            return f"ran together, by placement reason {closing.placement_reason}; does the cluster run with --placement apart?"
        return ""
    if not closing.prefill_executor_id or closing.prefill_executor_id == closing.decode_executor_id:
        return f"tells of a handoff within one executor: {_executors(closing)}"
    if closing.handoff.kv_bytes <= 0:
        return "tells of a handoff of no KV"
    return ""


def _executors(closing: Closing) -> str:
    return f"prefill {closing.prefill_executor_id or 'nowhere'}, decode {closing.decode_executor_id or 'nowhere'}"
