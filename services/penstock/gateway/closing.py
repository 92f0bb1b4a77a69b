"""What a request tells of itself in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.common.placement import PlacementReason
from penstock.gateway.answer import Closing, Fallback, Handoff

if TYPE_CHECKING:
    from penstock.gateway.machine import Request

__all__ = ["closing"]


def closing(request: Request) -> Closing:
    """The closing of a request that is complete."""
    now = request.now()
    first, last = request.record.first_token_at or now, request.record.last_token_at or now
    fallback, reason = request.record.fallbacks[-1][:2] if request.record.fallbacks else (Fallback.NONE, None)
    return Closing(
        prompt_tokens=len(request.plan.prompt_ids),
        completion_tokens=sum(c.told_tokens for c in request.choices),
        cached_tokens=request.record.cached_tokens,
        executor_ids=tuple(request.record.executor_ids),
        queue_seconds=request.record.queue_seconds,
        prefill_seconds=request.record.prefill_seconds,
        decode_seconds=max(0.0, last - first),
        total_seconds=now - request.record.arrived,
        replacements=request.record.replacements,
        preemptions=sum(c.preemptions for c in request.choices),
        seed=request.plan.sampling.seed,
        prefill_executor_id=request.record.prefill_executor_id,
        decode_executor_id=request.record.decode_executor_id,
        placement_reason=request.record.placements[-1][1] if request.record.placements else PlacementReason.UNSPECIFIED,
        handoff=_handoff(request),
        fallback=fallback,
        fallback_reason=reason,
        first_step_seconds=request.record.first_step_seconds or 0.0,
        encode_seconds=request.record.encode_seconds,
        first_token_seconds=request.record.first_token_seconds or 0.0,
        first_text_seconds=request.record.first_text_seconds or 0.0,
    )


def _handoff(request: Request) -> Handoff | None:
    arrivals = [arrival for _, arrival in request.record.arrivals]
    if not arrivals:
        return None
    return Handoff(
        kv_bytes=sum(a.kv_bytes for a in arrivals),
        transfer_seconds=sum(a.transfer_seconds for a in arrivals),
        exposed_seconds=sum(a.exposed_seconds for a in arrivals),
        transport=arrivals[-1].transport,
        native=all(a.native for a in arrivals),
    )
