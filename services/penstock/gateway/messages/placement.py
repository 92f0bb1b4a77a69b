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


def lease(told: scheduler_pb2.Lease) -> Lease:
    """Leave to run."""
    prefill = None
    if told.HasField("prefill"):
        prefill = PrefillLease(told.prefill.executor_id, told.prefill.address, told.prefill.tokens)
    return Lease(
        told.executor_id,
        told.address,
        told.tokens,
        told.queued_us / 1e6,
        prefill,
        _REASONS.get(told.reason, PlacementReason.UNSPECIFIED),
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


def executor(told: scheduler_pb2.ExecutorDescription) -> Executor:
    """One live executor."""
    defaults = told.defaults
    return Executor(
        executor_id=told.executor_id,
        address=told.address,
        model=told.model,
        model_fingerprint=told.model_fingerprint,
        tokenizer_fingerprint=told.tokenizer_fingerprint,
        architecture=told.architecture,
        backend=told.backend,
        device=told.device,
        dtype=told.dtype,
        backend_version=told.backend_version,
        features=tuple(told.features),
        kv_layout=told.kv_layout,
        kv_dtype=told.kv_dtype,
        context_length=told.context_length,
        vocabulary_size=told.vocabulary_size,
        kv_block_size=max(1, told.kv_block_size),
        kv_blocks=told.kv_blocks,
        fields=frozenset(told.fields),
        eos_token_ids=tuple(told.eos_token_ids),
        defaults=GenerationDefaults(
            temperature=defaults.temperature if defaults.HasField("temperature") else None,
            top_p=defaults.top_p if defaults.HasField("top_p") else None,
            top_k=defaults.top_k if defaults.HasField("top_k") else None,
            min_p=defaults.min_p if defaults.HasField("min_p") else None,
            repetition_penalty=defaults.repetition_penalty if defaults.HasField("repetition_penalty") else None,
        ),
    )
