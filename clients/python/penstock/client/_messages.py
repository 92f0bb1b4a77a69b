"""Messages of the wire to results."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from enum import StrEnum
from typing import TypeVar

from penstock.client._results import (
    Alternative,
    Calibration,
    Closing,
    Event,
    Fallback,
    Finish,
    FinishReason,
    Handoff,
    Model,
    ModelExecutor,
    Placement,
    PlacementReason,
    TokenCount,
    TokenLogprob,
    Usage,
)
from penstock.v1 import inference_pb2 as pb
from penstock.v1 import models_pb2

__all__ = ["Answer", "closing_of", "event_of", "model_of", "token_count_of"]

Answer = pb.GenerateResponse | pb.ChatResponse

Named = TypeVar("Named", bound=StrEnum)
Value = TypeVar("Value")


def event_of(answer: Answer) -> Event:
    """One message of a stream."""
    return Event(
        answer.index,
        answer.text,
        tuple(answer.token_ids),
        _logprobs(answer.logprobs) if answer.logprobs else (),
        _logprobs(answer.prompt_logprobs) if answer.prompt_logprobs else (),
        _finish(answer.finish) if answer.HasField("finish") else None,
    )


def closing_of(closing: pb.Closing) -> Closing:
    """The last message of a stream."""
    usage = closing.usage
    return Closing(
        usage=Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens),
        request_id=closing.request_id,
        model=closing.model,
        placements=tuple(Placement(p.executor_id, p.backend, p.device) for p in closing.placements),
        queue_seconds=closing.queue_time.ToNanoseconds() / 1e9,
        prefill_seconds=closing.prefill_time.ToNanoseconds() / 1e9,
        decode_seconds=closing.decode_time.ToNanoseconds() / 1e9,
        total_seconds=closing.total_time.ToNanoseconds() / 1e9,
        replacements=closing.replacements,
        preemptions=closing.preemptions,
        seed=closing.seed,
        prefill_executor_id=closing.prefill_executor_id,
        decode_executor_id=closing.decode_executor_id,
        placement_reason=_named(PlacementReason, pb.PlacementReason.Name, "PLACEMENT_REASON_", closing.placement_reason),
        handoff=_handoff(closing.handoff) if closing.HasField("handoff") else None,
        fallback=_named(Fallback, pb.Fallback.Name, "FALLBACK_", closing.fallback),
        fallback_reason=closing.fallback_reason,
        first_step_seconds=closing.first_step_time.ToNanoseconds() / 1e9,
        encode_seconds=closing.encode_time.ToNanoseconds() / 1e9,
        first_token_seconds=closing.first_token_time.ToNanoseconds() / 1e9,
        first_text_seconds=closing.first_text_time.ToNanoseconds() / 1e9,
    )


def _handoff(handoff: pb.Handoff) -> Handoff:
    return Handoff(
        handoff.kv_bytes,
        handoff.transfer_time.ToNanoseconds() / 1e9,
        handoff.exposed_time.ToNanoseconds() / 1e9,
        handoff.transport,
        handoff.native,
    )


def token_count_of(answer: pb.CountTokensResponse) -> TokenCount:
    """The answer of CountTokens."""
    return TokenCount(answer.count, tuple(answer.token_ids), answer.context_length)


def model_of(model: models_pb2.Model) -> Model:
    """One model."""
    return Model(
        name=model.name,
        fingerprint=model.fingerprint,
        architecture=model.architecture,
        context_length=model.context_length,
        vocabulary_size=model.vocabulary_size,
        executors=tuple(_executor(e) for e in model.executors),
        created=datetime.fromtimestamp(model.created_unix_seconds, UTC),
    )


def _executor(executor: models_pb2.ModelExecutor) -> ModelExecutor:
    return ModelExecutor(
        executor_id=executor.executor_id,
        backend=executor.backend,
        device=executor.device,
        dtype=executor.dtype,
        running=executor.running,
        waiting=executor.waiting,
        kv_blocks=executor.kv_blocks,
        kv_blocks_free=executor.kv_blocks_free,
        draining=executor.draining,
        backend_version=executor.backend_version,
        features=tuple(executor.features),
        kv_layout=executor.kv_layout,
        kv_dtype=executor.kv_dtype,
        role=executor.role,
        calibration=_calibration(executor.calibration) if executor.HasField("calibration") else None,
    )


def _calibration(calibration: models_pb2.Calibration) -> Calibration:
    return Calibration(
        calibration.prefill_tokens_per_second,
        {speed.batch: speed.tokens_per_second for speed in calibration.decode},
        calibration.prefill_chunk,
    )


def _named(kind: type[Named], name: Callable[[Value], str], prefix: str, value: Value) -> Named:
    """A value of the wire by its name. A newer server may tell one that is not known here."""
    try:
        return kind(name(value).removeprefix(prefix).lower())
    except ValueError:
        return kind("unspecified")


def _finish(finish: pb.Finish) -> Finish:
    reason = _named(FinishReason, pb.FinishReason.Name, "FINISH_REASON_", finish.reason)
    return Finish(
        reason,
        stop_text=finish.stop_text if reason is FinishReason.STOP_SEQUENCE else None,
        stop_token_id=finish.stop_token_id if finish.HasField("stop_token_id") else None,
    )


def _logprobs(given: Iterable[pb.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            one.token_id,
            one.logprob,
            one.token,
            one.rank,
            tuple(Alternative(a.token_id, a.logprob, a.token) for a in one.alternatives),
        )
        for one in given
    )
