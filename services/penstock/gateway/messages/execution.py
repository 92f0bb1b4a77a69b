"""What executors are told of a choice's sequences, and what they tell, as messages."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.gateway.answer import Handoff
from penstock.gateway.choice import Choice
from penstock.gateway.ports import HandoffFailure, SequenceEnd, SequenceStart, TokenReport
from penstock.internal.v1 import executor_pb2, handoff_pb2

__all__ = [
    "ENDS",
    "arrival",
    "handoff_failure",
    "prompt_reports",
    "receiving",
    "sending",
    "sequence_start",
    "together",
    "token_report",
    "why",
]

ENDS = {
    executor_pb2.SEQUENCE_FINISH_STOP: SequenceEnd.STOP,
    executor_pb2.SEQUENCE_FINISH_LENGTH: SequenceEnd.LENGTH,
    executor_pb2.SEQUENCE_FINISH_DEADLINE: SequenceEnd.DEADLINE,
}
_FAILURES = {getattr(executor_pb2, f"HANDOFF_FAILURE_{failure.name}"): failure for failure in HandoffFailure}
_TRANSPORT = len("HANDOFF_TRANSPORT_")


def together(choice: Choice) -> executor_pb2.StartSequence:
    """A sequence that prefills and decodes on one executor. Id, executor and deadline are left to be filled in, in all of these."""
    start = _start(choice)
    if choice.prompt_reports is None and choice.request.plan.reporting.prompt_logprobs is not None:
        start.prompt_logprobs = choice.request.plan.reporting.prompt_logprobs
    return start


def receiving(choice: Choice, prefill_executor_id: str) -> executor_pb2.StartSequence:
    """The half that decodes. It never sees the prompt's logits, so their log-probabilities are asked of the other half."""
    start = _start(choice)
    start.receive.prefill_executor_id = prefill_executor_id
    return start


def sending(choice: Choice, ticket: bytes) -> executor_pb2.StartSequence:
    """The half that prefills."""
    start = together(choice)
    start.send.ticket.ParseFromString(ticket)
    return start


def _start(choice: Choice) -> executor_pb2.StartSequence:
    plan, caller, sampling = choice.request.plan, choice.request.caller, choice.request.plan.sampling
    return executor_pb2.StartSequence(
        request_id=caller.request_id,
        traceparent=caller.traceparent,
        prompt_ids=plan.prompt_ids,
        replayed_ids=choice.ids,
        sampling=executor_pb2.SamplingParameters(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logit_bias=sampling.logit_bias,
            seed=(sampling.seed + choice.index) % 2**64,
        ),
        max_tokens=plan.max_tokens,
        min_tokens=plan.min_tokens,
        stop_token_ids=sorted(plan.stop_ids),
        logprobs=plan.reporting.logprobs,
        cache_salt=plan.salt,
        priority=plan.priority,
        tenant=caller.tenant,
    )


def sequence_start(told: executor_pb2.StartedSequence) -> SequenceStart:
    """A sequence's first report."""
    return SequenceStart(told.cached_tokens, told.waited_us / 1e6, told.prefill_us / 1e6)


def token_report(token_id: int, told: executor_pb2.TokenLogprobs) -> TokenReport:
    """The log-probability of a token."""
    return TokenReport(token_id, told.logprob, told.rank, list(told.top_ids), list(told.top_logprobs))


def prompt_reports(told: executor_pb2.PromptLogprobs, prompt_ids: Sequence[int]) -> list[TokenReport]:
    """Those of a prompt's tokens but the first."""
    return [token_report(prompt_ids[place.position], place) for place in told.tokens]


def arrival(told: executor_pb2.KvArrival) -> Handoff:
    """How KV came over."""
    transport = handoff_pb2.HandoffTransport.Name(told.transport)[_TRANSPORT:].lower()
    return Handoff(told.kv_bytes, told.transfer_us / 1e6, told.exposed_us / 1e6, transport, told.native)


def handoff_failure(told: executor_pb2.FinishedSequence) -> HandoffFailure | None:
    """Why KV was not handed over; None where a sequence ended by something else."""
    if told.reason != executor_pb2.SEQUENCE_FINISH_HANDOFF_FAILED:
        return None
    return _FAILURES.get(told.handoff_failure, HandoffFailure.REFUSED)


def why(told: executor_pb2.FinishedSequence) -> str:
    """How a sequence was lost, for the log."""
    reason = executor_pb2.SequenceFinish.Name(told.reason)
    if told.handoff_failure:
        reason += f" ({executor_pb2.HandoffFailure.Name(told.handoff_failure)})"
    return f"{reason}: {told.message}"
