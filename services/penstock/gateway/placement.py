"""The scheduler, as the state machine's `Placement` port: one `Place` stream, opened again whenever it is lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import grpc.aio

from penstock.common import faults
from penstock.common.errors import (
    DeadlineExceeded,
    InternalError,
    Overloaded,
    PenstockError,
    Unavailable,
    UnknownModel,
    UnsupportedField,
)
from penstock.gateway.answer import PlacementReason
from penstock.gateway.catalog import Catalog, Executor, GenerationDefaults
from penstock.gateway.machine import Request
from penstock.gateway.ports import Lease, Placing, PrefillLease, Refusal
from penstock.gateway.stream import Stream
from penstock.internal.v1 import scheduler_pb2, scheduler_pb2_grpc

__all__ = ["SchedulerPlacement"]

_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 2.0
_REASONS = {getattr(scheduler_pb2, f"PLACEMENT_REASON_{reason.name}"): reason for reason in PlacementReason}


class SchedulerPlacement:
    """Places requests and keeps the catalog. A placing has an id of its own, so that a late answer to an older one is no answer."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        catalog: Catalog,
        clock: Callable[[], float],
        on_catalog: Callable[[], None],
        on_lost: Callable[[str, str], None],
    ) -> None:
        self.connected = False
        self._catalog = catalog
        self._clock = clock
        self._on_catalog = on_catalog
        self._on_lost = on_lost
        self._ids = itertools.count(1)
        self._requests: dict[int, Request] = {}
        self._placing_ids: dict[int, int] = {}
        self._place: dict[int, scheduler_pb2.Placing] = {}
        self._released: list[int] = []
        self._announced: list[scheduler_pb2.Lease] = []
        self._prefilled: list[int] = []
        stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        self._list = stub.ListExecutors
        self._stream = Stream("scheduler", lambda: stub.Place(wait_for_ready=True), self, forever=True)

    @property
    def live(self) -> int:
        """Requests that are queued or leased."""
        return len(self._requests)

    async def run(self) -> None:
        """Keep the stream, for ever."""
        await self._stream.run()

    async def list_executors(self, timeout: float) -> scheduler_pb2.ListExecutorsResponse:  # noqa: ASYNC109 - gRPC's own deadline
        """The executors and their load, as the scheduler knows them now."""
        return await self._list(scheduler_pb2.ListExecutorsRequest(), timeout=timeout)

    # Placement

    def place(self, request: Request, placing: Placing) -> None:
        """Ask for a lease."""
        self._forget(request)
        number = next(self._ids)
        self._requests[number] = request
        self._placing_ids[request.number] = number
        # The first loss is placed again at once; behind it the pool gets time to notice what is gone.
        if placing.failures > 1:
            delay = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**placing.failures)
            asyncio.get_running_loop().call_later(delay, self._ask, number, placing)
        else:
            self._ask(number, placing)

    def _ask(self, number: int, placing: Placing) -> None:
        request = self._requests.get(number)
        if request is None:
            return  # it was given up meanwhile
        plan, caller = request.plan, request.caller
        self._place[number] = scheduler_pb2.Placing(
            request_id=number,
            model=plan.model,
            tokenizer_fingerprint=plan.tokenizer_fingerprint,
            # What is replayed is prompt to an executor.
            prompt_tokens=len(plan.prompt_ids) + placing.replayed,
            max_tokens=plan.max_tokens - placing.replayed,
            choices=plan.n,
            block_hashes=plan.block_hashes,
            fields=plan.fields,
            priority=plan.priority,
            tenant=caller.tenant,
            deadline_ms=max(1, int((caller.deadline - self._clock()) * 1000)),
            avoid_executor_ids=placing.avoid,
            replacing=placing.replacing,
            traceparent=caller.traceparent,
            client_request_id=caller.request_id,
        )
        self._stream.wake()

    def announce(self, request: Request, lease: Lease) -> None:
        """Tell a restarted scheduler of a lease."""
        number = self._placing_ids[request.number]
        self._announced.append(
            scheduler_pb2.Lease(
                request_id=number,
                executor_id=lease.executor_id,
                address=lease.address,
                tokens=lease.tokens,
                choices=request.plan.n,
                prefill=_prefill_message(lease.prefill),
            )
        )
        self._stream.wake()

    def prefilled(self, request: Request) -> None:
        """Give the prefill half of a lease back."""
        number = self._placing_ids.get(request.number)
        if number is not None:
            self._prefilled.append(number)
            self._stream.wake()

    def release(self, request: Request) -> None:
        """Give a lease or a place in the queue back."""
        number = self._forget(request)
        if number is not None:
            self._released.append(number)
            self._stream.wake()

    def _forget(self, request: Request) -> int | None:
        """Drop the request's placing; its id, if the scheduler may know it."""
        number = self._placing_ids.pop(request.number, None)
        if number is None:
            return None
        self._requests.pop(number, None)
        return number if self._place.pop(number, None) is None else None

    # The stream's peer

    def opened(self) -> None:
        """Announce leases and place what is queued again: the scheduler may be another one."""
        self._clear()
        for request in list(self._requests.values()):
            request.scheduler_back()

    def next_message(self) -> scheduler_pb2.PlaceRequest | None:
        """All that is pending."""
        if not (self._place or self._released or self._announced or self._prefilled):
            return None
        message = scheduler_pb2.PlaceRequest(
            place=self._place.values(), released=self._released, announced=self._announced, prefilled=self._prefilled
        )
        self._clear()
        return message

    def _clear(self) -> None:
        self._place.clear()
        self._released.clear()
        self._announced.clear()
        self._prefilled.clear()

    def received(self, message: scheduler_pb2.PlaceResponse) -> None:
        """Leases, refusals, the catalog, and executors that are lost."""
        if message.HasField("catalog"):
            self.connected = True
            self._catalog.update(_executor(e) for e in message.catalog.executors)
            self._on_catalog()
        for lease in message.granted:
            faults.reach("gateway.placed")
            request = self._requests.get(lease.request_id)
            if request is not None:
                request.granted(_lease(lease))
        for refusal in message.refused:
            request = self._requests.get(refusal.request_id)
            if request is not None:
                request.refused(Refusal(_error(refusal)))
        for executor_id in message.lost_executor_ids:  # last: what was granted before is lost too
            self._on_lost(executor_id, "the scheduler has lost it")

    def lost(self, why: str) -> None:  # noqa: ARG002 - the stream has logged it
        """Running requests do not notice."""
        self.connected = False
        self._on_catalog()


def _lease(told: scheduler_pb2.Lease) -> Lease:
    prefill = None
    if told.HasField("prefill"):
        prefill = PrefillLease(
            told.prefill.executor_id, told.prefill.address, told.prefill.tokens, told.prefill.expected_cached_tokens
        )
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
    return scheduler_pb2.PrefillLease(
        executor_id=prefill.executor_id,
        address=prefill.address,
        tokens=prefill.tokens,
        expected_cached_tokens=prefill.expected_cached_tokens,
    )


def _error(refusal: scheduler_pb2.Refusal) -> PenstockError:  # noqa: PLR0911 - one line for each reason
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
            return Unavailable(refusal.message or "the model's executors are gone")
        case scheduler_pb2.REFUSAL_REASON_DRAINING:
            return Unavailable(refusal.message or "the scheduler is draining")
        case _:
            return InternalError(f"the scheduler refused without a reason: {refusal.message}")


def _executor(told: scheduler_pb2.ExecutorDescription) -> Executor:
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
