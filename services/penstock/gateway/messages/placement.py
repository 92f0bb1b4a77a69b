"""What the scheduler is asked, and what it tells, as messages."""

from __future__ import annotations

from penstock.common.errors import (
    DeadlineExceeded,
    InternalError,
    Overloaded,
    PenstockError,
    Unavailable,
    UnknownModel,
    UnsupportedField,
)
from penstock.common.placement import PlacementReason
from penstock.gateway.catalog import Executor, GenerationDefaults
from penstock.gateway.machine import Request
from penstock.gateway.ports import Lease, Placing, PrefillLease
from penstock.internal.v1 import scheduler_pb2

__all__ = ["announced", "error", "executor", "lease", "placing"]

_REASONS = {getattr(scheduler_pb2, f"PLACEMENT_REASON_{reason.name}"): reason for reason in PlacementReason}


def placing(number: int, request: Request, asked: Placing, seconds_left: float) -> scheduler_pb2.Placing:
    """What a request needs."""
    plan, caller = request.plan, request.caller
    return scheduler_pb2.Placing(
        request_id=number,
        model=plan.model,
        tokenizer_fingerprint=plan.tokenizer_fingerprint,
        # What is replayed is prompt to an executor.
        prompt_tokens=len(plan.prompt_ids) + asked.replayed,
        max_tokens=plan.max_tokens - asked.replayed,
        choices=len(request.running),
        block_hashes=plan.block_hashes,
        fields=plan.fields,
        priority=plan.priority,
        tenant=caller.tenant,
        deadline_ms=max(1, int(seconds_left * 1000)),
        avoid_executor_ids=asked.avoid,
        replacing=asked.replacing,
        traceparent=caller.traceparent,
        client_request_id=caller.request_id,
    )


def announced(number: int, request: Request, held: Lease) -> scheduler_pb2.Lease:
    """A lease that another scheduler has granted."""
    return scheduler_pb2.Lease(
        request_id=number,
        executor_id=held.executor_id,
        address=held.address,
        tokens=held.tokens,
        choices=len(request.running),
        prefill=_prefill_message(held.prefill),
    )


def lease(granted: scheduler_pb2.Lease) -> Lease:
    """Leave to run."""
    prefill = None
    if granted.HasField("prefill"):
        prefill = PrefillLease(granted.prefill.executor_id, granted.prefill.address, granted.prefill.tokens)
    return Lease(
        granted.executor_id,
        granted.address,
        granted.tokens,
        granted.queued_us / 1e6,
        prefill,
        _REASONS.get(granted.reason, PlacementReason.UNSPECIFIED),
    )


def _prefill_message(prefill: PrefillLease | None) -> scheduler_pb2.PrefillLease | None:
    if prefill is None:
        return None
    return scheduler_pb2.PrefillLease(executor_id=prefill.executor_id, address=prefill.address, tokens=prefill.tokens)


def error(refusal: scheduler_pb2.Refusal) -> PenstockError:
    """What the client is told of a refusal."""
    match refusal.reason:
        case scheduler_pb2.REFUSAL_REASON_QUEUE_FULL:
            return Overloaded(refusal.message or "the queue is full", refusal.retry_after_ms / 1e3 or 1.0)
        case scheduler_pb2.REFUSAL_REASON_DEADLINE:
            return DeadlineExceeded(refusal.message or "the deadline passed in the queue")
        case scheduler_pb2.REFUSAL_REASON_UNKNOWN_MODEL:
            return UnknownModel(refusal.message or "no executor serves this model")
        case scheduler_pb2.REFUSAL_REASON_UNSUPPORTED:
            return UnsupportedField.field(refusal.field or "request", refusal.message or "no live executor supports this")
        case scheduler_pb2.REFUSAL_REASON_NO_EXECUTOR:
            return Unavailable(refusal.message or "the model's executors are gone", refusal.retry_after_ms / 1e3 or 1.0)
        case _:
            return InternalError(f"the scheduler refused without a reason: {refusal.message}")


def executor(description: scheduler_pb2.ExecutorDescription) -> Executor:
    """One live executor."""
    defaults = description.defaults
    return Executor(
        executor_id=description.executor_id,
        address=description.address,
        model=description.model,
        model_fingerprint=description.model_fingerprint,
        tokenizer_fingerprint=description.tokenizer_fingerprint,
        architecture=description.architecture,
        backend=description.backend,
        device=description.device,
        dtype=description.dtype,
        backend_version=description.backend_version,
        features=tuple(description.features),
        kv_layout=description.kv_layout,
        kv_dtype=description.kv_dtype,
        context_length=description.context_length,
        vocabulary_size=description.vocabulary_size,
        kv_block_size=max(1, description.kv_block_size),
        kv_blocks=description.kv_blocks,
        fields=frozenset(description.fields),
        eos_token_ids=tuple(description.eos_token_ids),
        defaults=GenerationDefaults(
            temperature=defaults.temperature if defaults.HasField("temperature") else None,
            top_p=defaults.top_p if defaults.HasField("top_p") else None,
            top_k=defaults.top_k if defaults.HasField("top_k") else None,
            min_p=defaults.min_p if defaults.HasField("min_p") else None,
            repetition_penalty=defaults.repetition_penalty if defaults.HasField("repetition_penalty") else None,
        ),
    )
