"""What happens to each request, for the event log. Where none is wanted nothing of this runs, and `Request` knows nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from penstock.common.errors import PenstockError
from penstock.common.events import EventLog
from penstock.common.handoff import HandoffFailure
from penstock.gateway.answer import Closing, Finish, Handoff, Logprob
from penstock.gateway.choice import Choice
from penstock.gateway.machine import Request
from penstock.gateway.ports import ExecutionPort, Lease, Loss, OutputPort, PrefillLease, Refusal
from penstock.gateway.states import Event, State

__all__ = ["History"]


class History:
    """Tells the event log of requests. Each event bears `request`, their number in this process."""

    def __init__(self, log: EventLog) -> None:
        self._log = log

    def request(self, *arguments: Any, **options: Any) -> Request:
        """A request that tells what happens to it; as `Request`."""
        return _Watched(self._log, *arguments, **options)

    def token(self, choice: Choice, executor_id: str, token_id: int, position: int) -> None:
        """An executor has told a token, be it the first to do so or not."""
        facts = {"choice": choice.index, "executor_id": executor_id, "position": position, "id": token_id}
        self._log.tell("token", {"request": choice.request.number, **facts})


class _Watched(Request):
    def __init__(self, log: EventLog, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._log = log
        self._fallbacks_told = 0
        self.execution = _Execution(self, self.execution)
        self.output = _Output(self, self.output)

    def tell(self, event: str, **facts: Any) -> None:
        self._log.tell(event, {"request": self.number, **facts})

    def begin(self) -> None:
        plan = self.plan
        sizes = {"prompt_tokens": len(plan.prompt_ids), "max_tokens": plan.max_tokens, "choices": plan.n}
        self.tell("accepted", request_id=self.caller.request_id, model=plan.model, **sizes)
        super().begin()

    def granted(self, lease: Lease) -> None:
        if self.state is State.QUEUED:
            prefill = lease.prefill and lease.prefill.executor_id
            where = {"executor_id": lease.executor_id, "prefill_executor_id": prefill}
            self.tell("placed", **where, reason=lease.reason.value, queued_seconds=lease.queued_seconds)
        super().granted(lease)

    def refused(self, refusal: Refusal) -> None:
        self.tell("refused", error=type(refusal.error).__name__)
        super().refused(refusal)

    def reserved_blocks(self, choice: Choice, sequence_id: int, ticket: bytes) -> None:
        if choice.runs(sequence_id):
            self.tell("reserved", choice=choice.index, executor_id=self.record.decode_executor_id)
        super().reserved_blocks(choice, sequence_id, ticket)

    def kv_arrived(self, choice: Choice, sequence_id: int, arrival: Handoff) -> None:
        if choice.runs(sequence_id):
            facts = {"kv_bytes": arrival.kv_bytes, "transport": arrival.transport, "native": arrival.native}
            self.tell("arrived", choice=choice.index, executor_id=self.record.decode_executor_id, **facts)
        super().kv_arrived(choice, sequence_id, arrival)

    def handed_off(self, choice: Choice, sequence_id: int, preemptions: int) -> None:
        if choice.prefills(sequence_id):
            self.tell("handed off", choice=choice.index, executor_id=self.record.prefill_executor_id)
        super().handed_off(choice, sequence_id, preemptions)

    def handoff_failed(self, choice: Choice, sequence_id: int, failure: HandoffFailure, why: str) -> None:
        if choice.runs(sequence_id):
            half = "prefill" if choice.prefills(sequence_id) else "decode"
            self.tell("handoff failed", choice=choice.index, half=half, reason=failure.value, why=why)
        super().handoff_failed(choice, sequence_id, failure, why)

    def sequence_lost(self, choice: Choice, sequence_id: int, loss: Loss, why: str) -> None:
        if choice.runs(sequence_id) or choice.prefills(sequence_id):
            half = "prefill" if choice.prefills(sequence_id) else "decode"
            self.tell("lost", choice=choice.index, half=half, reason=loss.value, why=why)
        super().sequence_lost(choice, sequence_id, loss, why)

    def apply(self, event: Event, *facts: Any) -> None:
        super().apply(event, *facts)
        self._tell_fallbacks()

    def _tell_fallbacks(self) -> None:
        while self._fallbacks_told < len(self.record.fallbacks):
            fallback, reason, _ = self.record.fallbacks[self._fallbacks_told]
            self._fallbacks_told += 1
            self.tell("fallback", fallback=fallback.value, reason=reason.value)

    @property
    def fallback(self) -> str | None:
        """The last one."""
        self._tell_fallbacks()
        return self.record.fallbacks[-1][0].value if self.record.fallbacks else None


class _Execution:
    """`penstock.gateway.ports.ExecutionPort` of one request."""

    def __init__(self, request: _Watched, execution: ExecutionPort) -> None:
        self._request = request
        self._execution = execution
        self.abort = execution.abort

    def start(self, lease: Lease, choice: Choice) -> int:
        """One executor does all of it."""
        self._tell(choice, lease.executor_id, "together")
        return self._execution.start(lease, choice)

    def receive(self, lease: Lease, prefill: PrefillLease, choice: Choice) -> int:
        """The half that decodes."""
        self._tell(choice, lease.executor_id, "decode")
        return self._execution.receive(lease, prefill, choice)

    def send(self, prefill: PrefillLease, ticket: bytes, choice: Choice) -> int:
        """The half that prefills."""
        self._tell(choice, prefill.executor_id, "prefill")
        return self._execution.send(prefill, ticket, choice)

    def _tell(self, choice: Choice, executor_id: str, half: str) -> None:
        self._request.tell("started", choice=choice.index, executor_id=executor_id, half=half, replayed=len(choice.ids))


class _Output:
    """`penstock.gateway.ports.OutputPort` of one request."""

    def __init__(self, request: _Watched, output: OutputPort) -> None:
        self._request = request
        self._output = output
        self._told = [0] * len(request.choices)
        self.prompt = output.prompt

    def text(self, index: int, text: str, token_ids: Sequence[int], logprobs: Sequence[Logprob]) -> None:
        """More of a choice."""
        self._tell(index)
        self._output.text(index, text, token_ids, logprobs)

    def finish(self, index: int, finish: Finish) -> None:
        """A choice is complete."""
        self._tell(index)
        self._output.finish(index, finish)

    def close(self, closing: Closing) -> None:
        """All choices are complete."""
        error = self._request.error
        self._end("answered" if error is None else type(error).__name__)
        self._output.close(closing)

    def fail(self, error: PenstockError) -> None:
        """The request failed."""
        self._end(type(error).__name__)
        self._output.fail(error)

    def _tell(self, index: int) -> None:
        first, told = self._told[index], self._request.choices[index].told_tokens
        if told > first:
            self._told[index] = told
            self._request.tell("told", choice=index, first=first, tokens=told - first)

    def _end(self, outcome: str) -> None:
        finishes = [choice.finish and choice.finish.reason.value for choice in self._request.choices]
        self._request.tell("ended", outcome=outcome, finish=finishes, told=self._told, fallback=self._request.fallback)
