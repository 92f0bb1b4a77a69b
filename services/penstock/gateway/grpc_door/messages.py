"""`penstock.v1` messages to what the core speaks, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import ListValue, Struct

from penstock.common.errors import InvalidRequest
from penstock.common.placement import PlacementReason
from penstock.gateway.admission import Call
from penstock.gateway.answer import Closing, Delta, Fallback, Finish, FinishReason, Handoff, Logprob
from penstock.gateway.bounds import (
    MAX_BIASES,
    MAX_MESSAGES,
    MAX_STOP_IDS,
    MAX_STOPS,
    MAX_TEMPLATE_KWARGS,
    Bounds,
    at_most,
    check_ids,
)
from penstock.gateway.catalog import Catalog
from penstock.gateway.request import Generation, Message, Reporting, Sampling, Stopping
from penstock.v1 import inference_pb2

__all__ = ["chat_generation", "closing", "conversation_input", "generate_generation", "prompt_input", "response"]

_REASONS = {
    FinishReason.STOP: inference_pb2.FINISH_REASON_STOP,
    FinishReason.STOP_SEQUENCE: inference_pb2.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.LENGTH: inference_pb2.FINISH_REASON_LENGTH,
    FinishReason.DEADLINE: inference_pb2.FINISH_REASON_DEADLINE,
    FinishReason.CANCELLED: inference_pb2.FINISH_REASON_CANCELLED,
    FinishReason.ERROR: inference_pb2.FINISH_REASON_ERROR,
}
_PLACEMENT_REASONS = {reason: getattr(inference_pb2, f"PLACEMENT_REASON_{reason.name}") for reason in PlacementReason}
_FALLBACKS = {fallback: getattr(inference_pb2, f"FALLBACK_{fallback.name}") for fallback in Fallback}

Response = TypeVar("Response", inference_pb2.GenerateResponse, inference_pb2.ChatResponse)


def generate_generation(request: inference_pb2.GenerateRequest, bounds: Bounds) -> Generation:
    """What `Generate` asks for. Lengths are checked before anything is converted, in all of these."""
    return Generation(**_shared(request), **prompt_input(request.prompt, bounds))


def chat_generation(request: inference_pb2.ChatRequest) -> Generation:
    """What `Chat` asks for."""
    return Generation(**_shared(request), **conversation_input(request.conversation))


def prompt_input(prompt: inference_pb2.Prompt, bounds: Bounds) -> dict[str, Any]:
    """The input fields of a `Generation`.

    Raises:
        InvalidRequest: there is no prompt.
        ContextOverflow: the context can not hold it.
    """
    match prompt.WhichOneof("kind"):
        case "text":
            return {"text": prompt.text}
        case "token_ids":
            check_ids(len(prompt.token_ids.ids), bounds)
            return {"token_ids": list(prompt.token_ids.ids)}
        case _:
            raise InvalidRequest.field("prompt", "is empty; give a text or token ids")


def conversation_input(conversation: inference_pb2.Conversation) -> dict[str, Any]:
    """The same of a conversation."""
    at_most("conversation.messages", len(conversation.messages), MAX_MESSAGES, "messages")
    return {
        "messages": [Message(m.role, m.content, m.name) for m in conversation.messages],
        "add_generation_prompt": conversation.add_generation_prompt if conversation.HasField("add_generation_prompt") else None,
        "continue_final_message": conversation.continue_final_message,
        "chat_template_kwargs": _scalars(conversation.chat_template_kwargs),
    }


def _scalars(given: Struct) -> dict[str, str | float | bool | None]:
    at_most("conversation.chat_template_kwargs", len(given), MAX_TEMPLATE_KWARGS, "names")
    scalars = {name: value for name, value in given.items() if not isinstance(value, Struct | ListValue)}
    if len(scalars) < len(given):
        raise InvalidRequest.field("conversation.chat_template_kwargs", "takes texts, numbers, true, false and null")
    return scalars


def _shared(request: inference_pb2.GenerateRequest | inference_pb2.ChatRequest) -> dict[str, Any]:
    sampling, stopping, reporting = request.sampling, request.stopping, request.reporting
    at_most("sampling.logit_bias", len(sampling.logit_bias), MAX_BIASES, "token ids")
    at_most("stopping.stop", len(stopping.stop), MAX_STOPS, "texts")
    at_most("stopping.stop_token_ids", len(stopping.stop_token_ids), MAX_STOP_IDS, "ids")
    return {
        "model": request.model,
        "sampling": Sampling(
            **_given(sampling, "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
            **_given(sampling, "repetition_penalty", "seed"),
            logit_bias=dict(sampling.logit_bias),
        ),
        "stopping": Stopping(
            **_given(stopping, "max_tokens", "min_tokens"),
            stop=tuple(stopping.stop),
            stop_token_ids=tuple(stopping.stop_token_ids),
            ignore_eos=stopping.ignore_eos,
            include_stop_text=stopping.include_stop_text,
        ),
        "reporting": Reporting(
            **_given(reporting, "logprobs", "prompt_logprobs"),
            token_ids=reporting.token_ids,
            echo=reporting.echo,
            special_tokens=reporting.special_tokens,
        ),
        "n": request.n or 1,
        "priority": request.priority,
        "cache_salt": request.cache_salt,
    }


def _given(message: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def response(delta: Delta, kind: Callable[..., Response]) -> Response:
    """More of a choice."""
    if not (delta.token_ids or delta.logprobs or delta.prompt_logprobs or delta.finish):
        return kind(index=delta.index, text=delta.text)
    return kind(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[_logprob(p) for p in delta.logprobs],
        prompt_logprobs=[_logprob(p) for p in delta.prompt_logprobs],
        finish=_finish(delta.finish) if delta.finish is not None else None,
    )


def _finish(finish: Finish) -> inference_pb2.Finish:
    return inference_pb2.Finish(reason=_REASONS[finish.reason], stop_text=finish.stop_text, stop_token_id=finish.stop_token_id)


def _logprob(logprob: Logprob) -> inference_pb2.TokenLogprob:
    return inference_pb2.TokenLogprob(
        token_id=logprob.token_id,
        logprob=logprob.logprob,
        token=logprob.token,
        rank=logprob.rank,
        alternatives=[
            inference_pb2.TokenLogprob.Alternative(token_id=a.token_id, logprob=a.logprob, token=a.token)
            for a in logprob.alternatives
        ],
    )


def closing(call: Call, closing: Closing, request_id: str, catalog: Catalog) -> inference_pb2.Closing:
    """The last message of a stream."""
    return inference_pb2.Closing(
        usage=inference_pb2.Usage(
            prompt_tokens=closing.prompt_tokens, completion_tokens=closing.completion_tokens, cached_tokens=closing.cached_tokens
        ),
        request_id=request_id,
        model=call.model.name,
        placements=_placements(closing.executor_ids, catalog),
        queue_time=_duration(closing.queue_seconds),
        prefill_time=_duration(closing.prefill_seconds),
        decode_time=_duration(closing.decode_seconds),
        total_time=_duration(closing.total_seconds),
        replacements=closing.replacements,
        preemptions=closing.preemptions,
        seed=closing.seed,
        prefill_executor_id=closing.prefill_executor_id,
        decode_executor_id=closing.decode_executor_id,
        placement_reason=_PLACEMENT_REASONS[closing.placement_reason],
        handoff=_handoff(closing.handoff) if closing.handoff is not None else None,
        fallback=_FALLBACKS[closing.fallback],
        fallback_reason=closing.fallback_reason.value if closing.fallback_reason is not None else "",
        first_step_time=_duration(closing.first_step_seconds),
        encode_time=_duration(closing.encode_seconds),
        first_token_time=_duration(closing.first_token_seconds),
        first_text_time=_duration(closing.first_text_seconds),
    )


def _handoff(handoff: Handoff) -> inference_pb2.Handoff:
    return inference_pb2.Handoff(
        kv_bytes=handoff.kv_bytes,
        transfer_time=_duration(handoff.transfer_seconds),
        exposed_time=_duration(handoff.exposed_seconds),
        transport=handoff.transport,
        native=handoff.native,
    )


def _placements(executor_ids: Sequence[str], catalog: Catalog) -> list[inference_pb2.Placement]:
    placements = []
    for executor_id in executor_ids:
        executor = catalog.executor(executor_id)
        backend, device = (executor.backend, executor.device) if executor is not None else ("", "")
        placements.append(inference_pb2.Placement(executor_id=executor_id, backend=backend, device=device))
    return placements


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration
