"""What a request tells of itself in the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.gateway.answer import Closing, Fallback, Handoff, PlacementReason

if TYPE_CHECKING:
    from penstock.gateway.machine import Request

__all__ = ["closing"]


def closing(request: Request) -> Closing:
    """The closing of a request that is complete."""
    now = request.now()
    first, last = request.first_token_at or now, request.last_token_at or now
    fallback, reason = request.fallbacks[-1][:2] if request.fallbacks else (Fallback.NONE, None)
    return Closing(
        prompt_tokens=len(request.plan.prompt_ids),
        completion_tokens=sum(c.told_tokens for c in request.choices),
        cached_tokens=request.cached_tokens,
        executor_ids=tuple(request.executor_ids),
        queue_seconds=request.queue_seconds,
        prefill_seconds=request.prefill_seconds,
        decode_seconds=max(0.0, last - first),
        total_seconds=now - request.arrived,
        replacements=request.replacements,
        preemptions=sum(c.preemptions for c in request.choices),
        seed=request.plan.sampling.seed,
        prefill_executor_id=request.prefill_executor_id,
        decode_executor_id=request.decode_executor_id,
        placement_reason=request.placements[-1][1] if request.placements else PlacementReason.UNSPECIFIED,
        handoff=_handoff(request),
        fallback=fallback,
        fallback_reason=reason,
        first_step_seconds=request.first_step_seconds or 0.0,
    )


def _handoff(request: Request) -> Handoff | None:
    arrivals = [arrival for _, arrival in request.arrivals]
    if not arrivals:
        return None
    return Handoff(
        kv_bytes=sum(a.kv_bytes for a in arrivals),
        transfer_seconds=sum(a.transfer_seconds for a in arrivals),
        exposed_seconds=sum(a.exposed_seconds for a in arrivals),
        transport=arrivals[-1].transport,
        native=all(a.native for a in arrivals),
    )
