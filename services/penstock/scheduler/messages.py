"""Messages into calls of the core, and outcomes into messages."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.common.errors import InvalidRequest
from penstock.common.placement import PlacementReason
from penstock.common.step_times import Curve, StepTimes
from penstock.internal.v1 import scheduler_pb2 as pb
from penstock.scheduler.core import Scheduler
from penstock.scheduler.executors import Executor
from penstock.scheduler.model import Description, Failing, Grant, Load, Needs, Prefill, Reason, Refused, Role
from penstock.scheduler.prefixes import unpack_hashes

__all__ = [
    "apply_place",
    "apply_register",
    "lease_message",
    "load_message",
    "peers_message",
    "read_description",
    "read_role",
    "refusal_message",
    "role_message",
]

_REASONS = {
    Reason.QUEUE_FULL: pb.REFUSAL_REASON_QUEUE_FULL,
    Reason.DEADLINE: pb.REFUSAL_REASON_DEADLINE,
    Reason.UNKNOWN_MODEL: pb.REFUSAL_REASON_UNKNOWN_MODEL,
    Reason.UNSUPPORTED: pb.REFUSAL_REASON_UNSUPPORTED,
    Reason.NO_EXECUTOR: pb.REFUSAL_REASON_NO_EXECUTOR,
}
_PLACEMENT_REASONS = {reason: getattr(pb, f"PLACEMENT_REASON_{reason.name}") for reason in PlacementReason}
_ROLES: dict[int, Role] = {pb.ROLE_BOTH: Role.BOTH, pb.ROLE_PREFILL: Role.PREFILL, pb.ROLE_DECODE: Role.DECODE}
_ROLE_MESSAGES = {Role.BOTH: pb.ROLE_BOTH, Role.PREFILL: pb.ROLE_PREFILL, Role.DECODE: pb.ROLE_DECODE}


def apply_place(core: Scheduler, gateway: int, frame: pb.PlaceRequest) -> None:
    """One frame of a gateway: what it gives back before what it asks for."""
    for lease in frame.announced:
        prefill = (lease.prefill.executor_id, lease.prefill.tokens) if lease.HasField("prefill") else None
        core.announce(gateway, lease.request_id, lease.executor_id, tokens=lease.tokens, choices=lease.choices, prefill=prefill)
    for request_id in frame.released:
        core.release(gateway, request_id)
    for request_id in frame.prefilled:
        core.prefilled(gateway, request_id)
    for placing in frame.place:
        core.place(gateway, placing.request_id, read_needs(placing))


def read_needs(placing: pb.Placing) -> Needs:
    """What a request needs."""
    return Needs(
        model=placing.model,
        tokenizer_fingerprint=placing.tokenizer_fingerprint,
        prompt_tokens=placing.prompt_tokens,
        max_tokens=placing.max_tokens,
        choices=placing.choices or 1,
        block_hashes=unpack_hashes(placing.block_hashes),
        fields=tuple(placing.fields),
        priority=placing.priority,
        tenant=placing.tenant,
        deadline=placing.deadline_ms / 1000 if placing.deadline_ms else None,
        avoid=frozenset(placing.avoid_executor_ids),
        replacing=placing.replacing,
        traceparent=placing.traceparent,
        client_request_id=placing.client_request_id,
    )


def read_description(message: pb.ExecutorDescription) -> Description:
    """What an executor is.

    Raises:
        InvalidRequest: it lacks what it is found or placed by, or its calibration is none.
    """
    for field in ("executor_id", "address", "model", "context_length", "kv_block_size", "kv_blocks", "max_batch_size"):
        if not getattr(message, field):
            raise InvalidRequest.field(f"description.{field}", "must be set: an executor is found and placed by it")
    return Description(
        executor_id=message.executor_id,
        address=message.address,
        model=message.model,
        tokenizer_fingerprint=message.tokenizer_fingerprint,
        context_length=message.context_length,
        kv_block_size=message.kv_block_size,
        kv_blocks=message.kv_blocks,
        max_batch_size=message.max_batch_size,
        fields=frozenset(message.fields),
        times=_read_times(message.calibration) if message.HasField("calibration") else None,
        model_fingerprint=message.model_fingerprint,
        features=frozenset(message.features),
        prefill_chunk=message.prefill_chunk,
        kv_bytes_per_token=message.kv_bytes_per_token,
        role=read_role(message.role, "description.role") if message.role else Role.BOTH,
    )


def read_role(message: int, field: str) -> Role:
    """A role that has to be told.

    Raises:
        InvalidRequest: it is none, naming the field.
    """
    role = _ROLES.get(message)
    if role is None:
        raise InvalidRequest.field(field, f"must be one of {', '.join(pb.Role.Name(m) for m in _ROLE_MESSAGES.values())}")
    return role


def role_message(role: Role) -> pb.Role.ValueType:
    """A role as it is told."""
    return _ROLE_MESSAGES[role]


def peers_message(peers: Iterable[tuple[Executor, bytes]], *, more: bool) -> pb.Peers:
    """Whom an executor may exchange KV with, and what it has to show each; `more`: those that it knew before, too."""
    described = ((peer.description, proof) for peer, proof in peers)
    return pb.Peers(
        peers=[
            pb.Peer(executor_id=d.executor_id, address=d.address, model_fingerprint=d.model_fingerprint, proof=proof)
            for d, proof in described
        ],
        more=more,
    )


def _read_times(message: pb.Calibration) -> StepTimes:
    try:
        return StepTimes(
            prefill=_read_curve(message.prefill),
            prefill_pair_seconds=message.prefill_pair_seconds,
            decode=_read_curve(message.decode),
            decode_context=message.decode_context,
            decode_token_seconds=message.decode_token_seconds,
        )
    except ValueError as error:
        raise InvalidRequest.field("description.calibration", str(error)) from error


def _read_curve(message: pb.StepCurve) -> Curve:
    return Curve(tuple(message.sizes), tuple(message.seconds))


def apply_register(core: Scheduler, executor: Executor, frame: pb.RegisterRequest) -> None:
    """One frame of an executor."""
    executors = core.executors
    executors.heard(executor)
    if frame.stalled:
        executors.stall(executor)
        return
    if frame.HasField("load"):
        executors.report(executor, _read_load(frame.load))
    if frame.HasField("kv_events"):
        events = frame.kv_events
        executors.kv_events(
            executor,
            events.sequence,
            stored=unpack_hashes(events.stored),
            removed=unpack_hashes(events.removed),
            cleared=events.cleared,
        )
    if frame.role:
        executors.take_role(executor, read_role(frame.role, "role"))
    if frame.draining:
        executors.drain(executor)


def _read_load(message: pb.Load) -> Load:
    return Load(
        running=message.running,
        waiting=message.waiting,
        kv_blocks_free=message.kv_blocks_free,
        waiting_tokens=message.waiting_tokens,
        steps_per_second=message.steps_per_second,
        prefill_tokens_per_second=message.prefill_tokens_per_second,
        receiving=message.receiving,
        sending=message.sending,
        handoff_bytes_per_second=message.handoff_bytes_per_second,
        failing=tuple(Failing(f.executor_id, f.sends, f.failures) for f in message.failing),
    )


def lease_message(grant: Grant) -> pb.Lease:
    """What a gateway is told of its lease."""
    return pb.Lease(
        request_id=grant.request_id,
        executor_id=grant.executor_id,
        address=grant.address,
        tokens=grant.tokens,
        queued_us=int(grant.queued_seconds * 1e6),
        expected_cached_tokens=grant.cached_tokens,
        choices=grant.choices,
        prefill=None if grant.prefill is None else _prefill_message(grant.prefill),
        reason=_PLACEMENT_REASONS[grant.reason],
    )


def _prefill_message(prefill: Prefill) -> pb.PrefillLease:
    return pb.PrefillLease(executor_id=prefill.executor_id, address=prefill.address, tokens=prefill.tokens)


def refusal_message(refused: Refused) -> pb.Refusal:
    """What a gateway is told of a refusal."""
    return pb.Refusal(
        request_id=refused.request_id,
        reason=_REASONS[refused.reason],
        field=refused.field,
        message=refused.message,
        retry_after_ms=int(refused.retry_after * 1000),
    )


def load_message(executor: Executor) -> pb.Load:
    """What an executor told of itself."""
    load = executor.load
    return pb.Load(
        running=load.running,
        waiting=load.waiting,
        kv_blocks_free=load.kv_blocks_free,
        waiting_tokens=load.waiting_tokens,
        prefill_tokens_per_second=load.prefill_tokens_per_second,
        steps_per_second=load.steps_per_second,
        receiving=load.receiving,
        sending=load.sending,
        handoff_bytes_per_second=load.handoff_bytes_per_second,
        failing=[pb.FailingPeer(executor_id=f.executor_id, sends=f.sends, failures=f.failures) for f in load.failing],
    )
