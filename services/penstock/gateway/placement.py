"""The scheduler, as the state machine's `PlacementPort`: one `Place` stream, opened again whenever it is lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import grpc.aio

from penstock.common import faults
from penstock.gateway.catalog import Catalog
from penstock.gateway.machine import Request
from penstock.gateway.messages import placement as messages
from penstock.gateway.ports import Lease, Placing, Refusal
from penstock.gateway.stream import Stream
from penstock.internal.v1 import scheduler_pb2, scheduler_pb2_grpc

__all__ = ["SchedulerPlacement"]

_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 2.0


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
        seconds_left = request.caller.deadline - self._clock()
        self._place[number] = messages.placing(number, request, placing, seconds_left)
        self._stream.wake()

    def announce(self, request: Request, lease: Lease) -> None:
        """Tell a restarted scheduler of a lease."""
        number = self._placing_ids[request.number]
        self._announced.append(messages.announced(number, request, lease))
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
            self._catalog.update((messages.executor(e) for e in message.catalog.executors), more=message.catalog.more)
            self._on_catalog()
        for lease in message.granted:
            faults.reach("gateway.placed")
            request = self._requests.get(lease.request_id)
            if request is not None:
                request.granted(messages.lease(lease))
        for refusal in message.refused:
            request = self._requests.get(refusal.request_id)
            if request is not None:
                request.refused(Refusal(messages.error(refusal)))
        for executor_id in message.lost_executor_ids:  # last: what was granted before is lost too
            self._on_lost(executor_id, "the scheduler has lost it")

    def lost(self, why: str) -> None:  # noqa: ARG002 - the stream has logged it
        """Running requests do not notice."""
        self.connected = False
        self._catalog.more()
        self._on_catalog()
