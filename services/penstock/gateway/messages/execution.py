"""What executors are told of a choice's sequences, and what they tell, as messages."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.common.handoff import HandoffFailure
from penstock.gateway.answer import Handoff
from penstock.gateway.choice import Choice
from penstock.gateway.ports import SequenceEnd, SequenceStart, TokenReport
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


def sequence_start(started: executor_pb2.StartedSequence) -> SequenceStart:
    """A sequence's first report."""
    return SequenceStart(started.cached_tokens, started.waited_us / 1e6, started.prefill_us / 1e6)


def token_report(token_id: int, logprobs: executor_pb2.TokenLogprobs) -> TokenReport:
    """The log-probability of a token."""
    return TokenReport(token_id, logprobs.logprob, logprobs.rank, list(logprobs.top_ids), list(logprobs.top_logprobs))


def prompt_reports(logprobs: executor_pb2.PromptLogprobs, prompt_ids: Sequence[int]) -> list[TokenReport]:
    """Those of a prompt's tokens but the first."""
    return [token_report(prompt_ids[place.position], place) for place in logprobs.tokens]


def arrival(arrived: executor_pb2.KvArrival) -> Handoff:
    """How KV came over."""
    transport = handoff_pb2.HandoffTransport.Name(arrived.transport)[_TRANSPORT:].lower()
    return Handoff(arrived.kv_bytes, arrived.transfer_us / 1e6, arrived.exposed_us / 1e6, transport, arrived.native)


def handoff_failure(finished: executor_pb2.FinishedSequence) -> HandoffFailure | None:
    """Why KV was not handed over; None where a sequence ended by something else."""
    if finished.reason != executor_pb2.SEQUENCE_FINISH_HANDOFF_FAILED:
        return None
    return _FAILURES.get(finished.handoff_failure, HandoffFailure.REFUSED)


def why(finished: executor_pb2.FinishedSequence) -> str:
    """How a sequence was lost, for the log."""
    reason = executor_pb2.SequenceFinish.Name(finished.reason)
    if finished.handoff_failure:
        reason += f" ({executor_pb2.HandoffFailure.Name(finished.handoff_failure)})"
    return f"{reason}: {finished.message}"
