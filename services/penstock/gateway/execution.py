"""The executors, as the state machine's `ExecutionPort`: one `Run` stream to each that a request was placed on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence

from penstock.common import faults
from penstock.common.channel import connect
from penstock.common.handoff import HandoffFailure
from penstock.common.logs import logger
from penstock.gateway.choice import Choice
from penstock.gateway.messages import execution as messages
from penstock.gateway.ports import Lease, Loss, PrefillLease
from penstock.gateway.stream import Stream
from penstock.internal.v1 import executor_pb2, executor_pb2_grpc

__all__ = ["ExecutorPool"]


class ExecutorPool:
    """Streams to executors, by executor id. A stream that breaks loses its sequences and is opened anew by the next start.

    Args:
        clock: monotonic seconds.
        on_frame: told once after each frame, however many tokens it held.
        on_token: told of each token before its request is: the choice, the executor, the token and its position; None: nobody is.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        on_frame: Callable[[], None],
        on_token: Callable[[Choice, str, int, int], None] | None = None,
    ) -> None:
        self.on_token = on_token
        self._clock = clock
        self._on_frame = on_frame
        self._ids = itertools.count(1)
        self._links: dict[str, _Link] = {}
        self._link_of: dict[int, _Link] = {}

    @property
    def live(self) -> int:
        """Sequences that run."""
        return len(self._link_of)

    def start(self, lease: Lease, choice: Choice) -> int:
        """Start, or go on with, a choice's sequence."""
        return self._start(lease.executor_id, lease.address, choice, messages.together(choice))

    def receive(self, lease: Lease, prefill: PrefillLease, choice: Choice) -> int:
        """Start the half of a choice that decodes."""
        return self._start(lease.executor_id, lease.address, choice, messages.receiving(choice, prefill.executor_id))

    def send(self, prefill: PrefillLease, ticket: bytes, choice: Choice) -> int:
        """Start the half of a choice that prefills."""
        return self._start(prefill.executor_id, prefill.address, choice, messages.sending(choice, ticket))

    def _start(self, executor_id: str, address: str, choice: Choice, message: executor_pb2.StartSequence) -> int:
        link = self._links.get(executor_id)
        if link is None:
            link = self._links[executor_id] = _Link(self, executor_id, address)
        message.sequence_id = sequence_id = next(self._ids)
        message.executor_id = executor_id
        message.deadline_ms = max(1, int((choice.request.caller.deadline - self._clock()) * 1000))
        self._link_of[sequence_id] = link
        link.start(choice, message)
        return sequence_id

    def abort(self, sequence_id: int) -> None:
        """Stop a sequence."""
        link = self._link_of.pop(sequence_id, None)
        if link is not None:
            link.abort(sequence_id)

    def keep(self, executor_ids: Sequence[str]) -> None:
        """Close idle streams to executors that are not among these."""
        for executor_id, link in list(self._links.items()):
            if executor_id not in executor_ids and not link.choices:
                link.close()
                del self._links[executor_id]

    async def close(self) -> None:
        """Close all streams."""
        links, self._links = list(self._links.values()), {}
        for link in links:
            link.close()
        await asyncio.gather(*(link.closed() for link in links))

    def frame_done(self, ended: Sequence[int]) -> None:
        """A link has passed a frame on, in which these sequences ended."""
        for sequence_id in ended:
            self._link_of.pop(sequence_id, None)
        self._on_frame()

    def lose(self, executor_id: str, why: str) -> None:
        """An executor is not to be waited for any more, though its stream stands: what ran there goes on elsewhere."""
        link = self._links.get(executor_id)
        if link is not None:
            link.lost(why)
            link.close()

    def link_lost(self, executor_id: str, link: _Link) -> None:
        """A link's stream is gone."""
        if self._links.get(executor_id) is link:
            del self._links[executor_id]
        for sequence_id in link.choices:
            self._link_of.pop(sequence_id, None)


class _Link:
    """One executor's stream."""

    def __init__(self, pool: ExecutorPool, executor_id: str, address: str) -> None:
        self.choices: dict[int, Choice] = {}
        self._pool = pool
        self._executor_id = executor_id
        self._start: dict[int, executor_pb2.StartSequence] = {}
        self._aborted: list[int] = []
        self._channel = connect(address)
        self._stream: Stream[executor_pb2.RunRequest, executor_pb2.RunResponse] = Stream(
            f"executor {executor_id}", executor_pb2_grpc.ExecutorServiceStub(self._channel).Run, self, forever=False
        )
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        # A task keeps the exception that it ends with, and with it the frames that hold the call: the connection would stay
        # until a collection.
        with contextlib.suppress(asyncio.CancelledError):
            try:
                await self._stream.run()
            finally:
                await self._channel.close()

    def close(self) -> None:
        self._task.cancel()

    async def closed(self) -> None:
        await asyncio.wait((self._task,))

    def start(self, choice: Choice, message: executor_pb2.StartSequence) -> None:
        self.choices[message.sequence_id] = choice
        self._start[message.sequence_id] = message
        self._stream.wake()

    def abort(self, sequence_id: int) -> None:
        if self.choices.pop(sequence_id, None) is not None and self._start.pop(sequence_id, None) is None:
            self._aborted.append(sequence_id)
            self._stream.wake()

    # The stream's peer

    def opened(self) -> None:
        """What is pending is what the executor has to know."""

    def next_message(self) -> executor_pb2.RunRequest | None:
        if not (self._start or self._aborted):
            return None
        message = executor_pb2.RunRequest(start=self._start.values(), aborted=self._aborted)
        self._start.clear()
        self._aborted.clear()
        return message

    def received(self, message: executor_pb2.RunResponse) -> None:
        choices, on_token = self.choices, self._pool.on_token
        if message.sequence_ids:
            faults.reach("gateway.token")
        if message.reserved or message.arrived:
            self._handoffs(message)
        if message.started or message.logprobs or message.prompt_logprobs:
            self._facts(message)
        for sequence_id, token_id, position in zip(message.sequence_ids, message.token_ids, message.positions, strict=True):
            choice = choices.get(sequence_id)
            if choice is not None:
                if on_token is not None:
                    on_token(choice, self._executor_id, token_id, position)
                choice.request.token(choice, token_id, position)
        ended = [finished.sequence_id for finished in message.finished]
        for finished in message.finished:
            self._ended(finished)
        self._pool.frame_done(ended)

    def _handoffs(self, message: executor_pb2.RunResponse) -> None:
        for reserved in message.reserved:
            faults.reach("gateway.reserved")
            if (choice := self.choices.get(reserved.sequence_id)) is not None:
                choice.request.reserved_blocks(choice, reserved.sequence_id, reserved.ticket.SerializeToString())
        for arrived in message.arrived:
            faults.reach("gateway.arrived")
            if (choice := self.choices.get(arrived.sequence_id)) is not None:
                choice.request.kv_arrived(choice, arrived.sequence_id, messages.arrival(arrived))

    def _facts(self, message: executor_pb2.RunResponse) -> None:
        choices = self.choices
        for started in message.started:
            if (choice := choices.get(started.sequence_id)) is not None:
                choice.request.sequence_started(choice, started.sequence_id, messages.sequence_start(started))
        for prompt in message.prompt_logprobs:
            if (choice := choices.get(prompt.sequence_id)) is not None:
                choice.request.prompt_report(choice, messages.prompt_reports(prompt, choice.request.plan.prompt_ids))
        if message.logprobs:
            ids = dict(zip(zip(message.sequence_ids, message.positions, strict=True), message.token_ids, strict=True))
            for logprobs in message.logprobs:
                if (choice := choices.get(logprobs.sequence_id)) is not None:
                    token_id = ids[logprobs.sequence_id, logprobs.position]
                    choice.request.report(choice, logprobs.position, messages.token_report(token_id, logprobs))

    def _ended(self, finished: executor_pb2.FinishedSequence) -> None:
        sequence_id = finished.sequence_id
        choice = self.choices.pop(sequence_id, None)
        if choice is None:
            return
        request = choice.request
        if finished.reason == executor_pb2.SEQUENCE_FINISH_HANDED_OFF:
            faults.reach("gateway.handed_off")
            request.handed_off(choice, sequence_id, finished.preemptions)
            return
        end = messages.ENDS.get(finished.reason)
        if end is not None:
            request.sequence_ended(choice, sequence_id, end, finished.preemptions)
            return
        failure = messages.handoff_failure(finished)
        why = messages.why(finished)
        # The echo of what the other half says itself: that it has failed or, of an older executor, that it has ended.
        tell = logger().debug if failure is HandoffFailure.ABORTED else logger().warning
        tell("sequence lost", executor_id=self._executor_id, request_id=request.caller.request_id, why=why)
        if failure is not None:
            faults.reach("gateway.handoff_failed")
            request.handoff_failed(choice, sequence_id, failure, why)
        else:
            refused = finished.reason == executor_pb2.SEQUENCE_FINISH_REFUSED
            request.sequence_lost(choice, sequence_id, Loss.REFUSED if refused else Loss.FAILED, why)

    def lost(self, why: str) -> None:
        """Everything that ran here goes on elsewhere."""
        self._pool.link_lost(self._executor_id, self)
        choices, self.choices = self.choices, {}
        if choices:
            logger().warning("executor lost", executor_id=self._executor_id, why=why, sequences=len(choices))
        for sequence_id, choice in choices.items():
            choice.request.sequence_lost(choice, sequence_id, Loss.LOST, why)
