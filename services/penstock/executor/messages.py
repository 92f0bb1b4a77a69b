"""Between messages and the engine's plain types."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.backends.contract import Tuned
from penstock.common.handoff import HandoffFailure
from penstock.common.prefix import wire_form
from penstock.common.step_times import Curve, StepTimes
from penstock.executor.engine import Engine
from penstock.executor.handoff.ticket import Arrival, Receive, Send, Ticket, Transport
from penstock.executor.kv_events import KvChanges
from penstock.executor.loading import Loaded
from penstock.executor.sampling import SamplingParameters, TokenLogprob
from penstock.executor.sequence import Finish, Finished, Frame, SequenceRequest, Started
from penstock.internal.v1 import executor_pb2 as pb
from penstock.internal.v1 import handoff_pb2, scheduler_pb2

__all__ = ["describe", "kv_events", "load_of", "merge", "read_start", "read_ticket", "tell_ticket"]

_FINISHES = {
    Finish.STOP: pb.SEQUENCE_FINISH_STOP,
    Finish.LENGTH: pb.SEQUENCE_FINISH_LENGTH,
    Finish.DEADLINE: pb.SEQUENCE_FINISH_DEADLINE,
    Finish.REFUSED: pb.SEQUENCE_FINISH_REFUSED,
    Finish.FAILED: pb.SEQUENCE_FINISH_FAILED,
    Finish.HANDED_OFF: pb.SEQUENCE_FINISH_HANDED_OFF,
    Finish.HANDOFF_FAILED: pb.SEQUENCE_FINISH_HANDOFF_FAILED,
}
_HANDOFF_FAILURES = {
    None: pb.HANDOFF_FAILURE_UNSPECIFIED,
    HandoffFailure.LEASE_EXPIRED: pb.HANDOFF_FAILURE_LEASE_EXPIRED,
    HandoffFailure.ABORTED: pb.HANDOFF_FAILURE_ABORTED,
    HandoffFailure.REFUSED: pb.HANDOFF_FAILURE_REFUSED,
    HandoffFailure.UNKNOWN_PEER: pb.HANDOFF_FAILURE_UNKNOWN_PEER,
    HandoffFailure.BACKEND: pb.HANDOFF_FAILURE_BACKEND,
    HandoffFailure.INCOMPATIBLE: pb.HANDOFF_FAILURE_INCOMPATIBLE,
}
_TRANSPORTS = {
    Transport.GRPC: handoff_pb2.HANDOFF_TRANSPORT_GRPC,
    Transport.SHARED_MEMORY: handoff_pb2.HANDOFF_TRANSPORT_SHARED_MEMORY,
    Transport.NIXL: handoff_pb2.HANDOFF_TRANSPORT_NIXL,
}
_FIELDS = (
    *("sampling.temperature", "sampling.top_p", "sampling.top_k", "sampling.min_p", "sampling.presence_penalty"),
    *("sampling.frequency_penalty", "sampling.repetition_penalty", "sampling.logit_bias", "sampling.seed"),
    *("stopping.max_tokens", "stopping.min_tokens", "stopping.stop", "stopping.stop_token_ids", "stopping.ignore_eos"),
    "reporting.logprobs",
)


def read_start(start: pb.StartSequence, now: float) -> SequenceRequest:
    """What a gateway asks. Without sampling parameters it is greedy."""
    s = start.sampling
    sampling = SamplingParameters(temperature=0)
    if start.HasField("sampling"):
        sampling = SamplingParameters(
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            repetition_penalty=s.repetition_penalty,
            logit_bias=dict(s.logit_bias),
            seed=s.seed,
        )
    return SequenceRequest(
        sequence_id=start.sequence_id,
        prompt=list(start.prompt_ids),
        replayed=list(start.replayed_ids),
        sampling=sampling,
        max_tokens=start.max_tokens,
        min_tokens=start.min_tokens,
        stop_ids=list(start.stop_token_ids),
        logprobs=start.logprobs if start.HasField("logprobs") else None,
        prompt_logprobs=start.prompt_logprobs if start.HasField("prompt_logprobs") else None,
        salt=start.cache_salt,
        priority=start.priority,
        tenant=start.tenant,
        deadline=now + start.deadline_ms / 1000 if start.deadline_ms else None,
        handoff=_read_handoff(start),
        request_id=start.request_id,
    )


def _read_handoff(start: pb.StartSequence) -> Receive | Send | None:
    match start.WhichOneof("handoff"):
        case "receive":
            return Receive(start.receive.prefill_executor_id)
        case "send":
            return Send(read_ticket(start.send.ticket))
    return None


def read_ticket(ticket: handoff_pb2.HandoffTicket) -> Ticket:
    """A ticket as another executor minted it; nothing of it has been checked."""
    return Ticket(
        handoff_id=ticket.handoff_id,
        decode_executor_id=ticket.decode_executor_id,
        prefill_executor_id=ticket.prefill_executor_id,
        cached_tokens=ticket.cached_tokens,
        tokens=ticket.tokens,
        lease_seconds=ticket.lease_ms / 1000,
    )


def tell_ticket(ticket: Ticket) -> handoff_pb2.HandoffTicket:
    """The same, on its way."""
    return handoff_pb2.HandoffTicket(
        handoff_id=ticket.handoff_id,
        decode_executor_id=ticket.decode_executor_id,
        prefill_executor_id=ticket.prefill_executor_id,
        cached_tokens=ticket.cached_tokens,
        tokens=ticket.tokens,
        lease_ms=round(ticket.lease_seconds * 1000),
    )


def merge(frames: Iterable[Frame]) -> pb.RunResponse:
    """Frames, in order, as one message."""
    response = pb.RunResponse()
    for frame in frames:
        response.sequence_ids.extend(frame.sequence_ids)
        response.token_ids.extend(frame.token_ids)
        response.positions.extend(frame.positions)
        if frame.finished:
            response.finished.extend(map(_finished, frame.finished))
        if frame.started:
            response.started.extend(map(_started, frame.started))
        if frame.logprobs:
            response.logprobs.extend(_logprob(*each) for each in frame.logprobs)
        for sequence_id, places in frame.prompt_logprobs:
            tokens = [_logprob(sequence_id, i, place) for i, place in enumerate(places, start=1)]
            response.prompt_logprobs.append(pb.PromptLogprobs(sequence_id=sequence_id, tokens=tokens))
        if frame.reserved:
            response.reserved.extend(pb.ReservedHandoff(sequence_id=i, ticket=tell_ticket(t)) for i, t in frame.reserved)
        if frame.arrived:
            response.arrived.extend(_arrival(*each) for each in frame.arrived)
    return response


def _finished(finished: Finished) -> pb.FinishedSequence:
    return pb.FinishedSequence(
        sequence_id=finished.sequence_id,
        reason=_FINISHES[finished.reason],
        preemptions=finished.preemptions,
        message=finished.message,
        handoff_failure=_HANDOFF_FAILURES[finished.handoff_failure],
    )


def _arrival(sequence_id: int, arrival: Arrival) -> pb.KvArrival:
    return pb.KvArrival(
        sequence_id=sequence_id,
        kv_bytes=arrival.kv_bytes,
        waited_us=int(arrival.waited * 1e6),
        transfer_us=int(arrival.transfer * 1e6),
        exposed_us=int(arrival.exposed * 1e6),
        transport=_TRANSPORTS[arrival.transport],
        native=arrival.native,
        pushes=arrival.pushes,
        resumptions=arrival.resumptions,
    )


def _started(started: Started) -> pb.StartedSequence:
    return pb.StartedSequence(
        sequence_id=started.sequence_id,
        cached_tokens=started.cached_tokens,
        waited_us=int(started.waited * 1e6),
        prefill_us=int(started.prefill * 1e6),
    )


def _logprob(sequence_id: int, position: int, logprob: TokenLogprob) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        sequence_id=sequence_id,
        position=position,
        logprob=logprob.logprob,
        rank=logprob.rank,
        top_ids=logprob.top_ids,
        top_logprobs=logprob.top_logprobs,
    )


def load_of(engine: Engine) -> scheduler_pb2.Load:
    """How busy the engine is now."""
    planner, meter = engine.planner, engine.meter
    return scheduler_pb2.Load(
        running=len(planner.running),
        waiting=len(planner.waiting),
        kv_blocks_free=engine.blocks.available,
        waiting_tokens=planner.waiting_tokens(),
        prefill_tokens_per_second=meter.prefill_tokens_per_second,
        steps_per_second=meter.steps_per_second,
        receiving=len(planner.receiving),
        sending=len(planner.sending),
    )


def kv_events(changes: KvChanges) -> scheduler_pb2.KvEvents:
    """Changes of the prefix cache as the scheduler is told them."""
    return scheduler_pb2.KvEvents(
        sequence=changes.sequence,
        stored=wire_form(changes.stored),
        removed=wire_form(changes.removed),
        cleared=changes.cleared,
    )


def describe(loaded: Loaded, executor_id: str, address: str, tokenizer: str) -> scheduler_pb2.ExecutorDescription:
    """What the executor is."""
    spec, decoder, defaults = loaded.spec, loaded.spec.decoder, loaded.spec.defaults
    limits = loaded.engine.planner.limits
    prompt_fields = ("reporting.prompt_logprobs",) if loaded.capabilities.prompt_logits else ()
    return scheduler_pb2.ExecutorDescription(
        executor_id=executor_id,
        address=address,
        model=loaded.name,
        model_fingerprint=spec.fingerprint,
        tokenizer_fingerprint=tokenizer,
        architecture=decoder.architecture,
        backend=loaded.backend,
        backend_version=loaded.backend_version,
        device=loaded.model.device,
        dtype=loaded.model.dtype.value,
        features=_features(loaded),
        kv_layout=loaded.model.kv.layout,
        kv_dtype=loaded.model.kv.dtype,
        context_length=loaded.engine.context_length,
        vocabulary_size=decoder.vocabulary_size,
        kv_block_size=loaded.model.kv.block_size,
        kv_blocks=loaded.model.kv.blocks,
        max_batch_size=limits.max_batch_size,
        prefill_chunk=limits.prefill_chunk,
        calibration=None if loaded.times is None else _calibration(loaded.times),
        fields=[*_FIELDS, *prompt_fields],
        native_layout=loaded.model.kv.native_layout,
        kv_bytes_per_token=loaded.model.kv.canonical_bytes(1, loaded.model.kv.canonical_dtype),
        eos_token_ids=decoder.eos_token_ids,
        defaults=scheduler_pb2.GenerationDefaults(
            temperature=defaults.temperature,
            top_p=defaults.top_p,
            top_k=defaults.top_k,
            min_p=defaults.min_p,
            repetition_penalty=defaults.repetition_penalty,
        ),
    )


def _calibration(times: StepTimes) -> scheduler_pb2.Calibration:
    return scheduler_pb2.Calibration(
        prefill=_curve(times.prefill),
        prefill_pair_seconds=times.prefill_pair_seconds,
        decode=_curve(times.decode),
        decode_context=times.decode_context,
        decode_token_seconds=times.decode_token_seconds,
    )


def _curve(curve: Curve) -> scheduler_pb2.StepCurve:
    return scheduler_pb2.StepCurve(sizes=curve.sizes, seconds=curve.seconds)


def _features(loaded: Loaded) -> list[str]:
    """What the backend can do, less what the operator has turned off; and how it does what it has several ways for."""
    off = set() if loaded.engine.blocks.caching else {"prefix_cache"}
    ways = loaded.model.ways if isinstance(loaded.model, Tuned) else {}
    return [*(name for name in loaded.capabilities.features if name not in off), *(f"{what}={way}" for what, way in ways.items())]
