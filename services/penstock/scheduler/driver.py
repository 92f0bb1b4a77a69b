"""Steps the core on the event loop: after inputs, once for all that came in one turn of the loop, and when a timer is due."""

from __future__ import annotations

import asyncio
import time

from penstock.common import faults, tracing
from penstock.common.logs import logger
from penstock.internal.v1 import scheduler_pb2 as pb
from penstock.scheduler import messages
from penstock.scheduler.core import Scheduler
from penstock.scheduler.members import Members
from penstock.scheduler.metrics import SchedulerMetrics
from penstock.scheduler.model import Grant, Lost, Outcome, Refused
from penstock.scheduler.outbox import Outbox

__all__ = ["Driver"]

# A timer that is so late has waited for this process, which was stopped or got no processor.
_OVERSLEPT_SECONDS = 0.25


class Driver:
    """Connects the core with the streams.

    Args:
        core: what decides. Its clock is the event loop's.
        metrics: where outcomes are counted.

    Attributes:
        members: the executors' streams.
        ended: set when `end` was called and no gateway's stream is left.
    """

    def __init__(self, core: Scheduler, metrics: SchedulerMetrics) -> None:
        self._core = core
        self._metrics = metrics
        self._outboxes: dict[int, Outbox[pb.PlaceResponse]] = {}
        self.members = Members(core.executors, lambda: core.settles_at is not None)
        self._told_version = 0
        self._settling = True
        self._kicked = False
        self._timer: asyncio.TimerHandle | None = None
        self._ending = False
        self.ended = asyncio.Event()

    def connect(self, gateway: int) -> Outbox[pb.PlaceResponse]:
        """A gateway's stream begins; the catalog goes out first. After `end` it is all that goes out."""
        outbox = self._outboxes[gateway] = Outbox(pb.PlaceResponse)
        outbox.response.catalog.CopyFrom(self._catalog())
        outbox.flush()
        if self._ending:
            outbox.close()
        self.kick()
        return outbox

    def disconnect(self, gateway: int) -> None:
        """It has ended."""
        del self._outboxes[gateway]
        self._note_end()

    def end(self) -> None:
        """Have the streams of gateways end once what is decided is told, and new ones at once."""
        self._ending = True
        for outbox in self._outboxes.values():
            outbox.close()
        self._note_end()

    def kick(self) -> None:
        """Step soon: once, however many inputs come before."""
        if not self._kicked:
            self._kicked = True
            asyncio.get_running_loop().call_soon(self._step)

    def _note_end(self) -> None:
        if self._ending and not self._outboxes:
            self.ended.set()

    def stop(self) -> None:
        """No timer fires any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def list_executors(self) -> pb.ListExecutorsResponse:
        """All that live, those that drain too."""
        states = [
            pb.ExecutorState(
                description=description,
                load=messages.load_message(executor),
                draining=executor.draining,
                leases=executor.hold.leases,
                prefill_leases=executor.hold.prefill_leases,
            )
            for executor, description in self.members.described()
        ]
        return pb.ListExecutorsResponse(executors=states, queued=self._core.queued)

    def _step(self) -> None:
        self._kicked = False
        late = 0.0 if self._timer is None else asyncio.get_running_loop().time() - self._timer.when()
        if late > _OVERSLEPT_SECONDS:
            self._core.executors.overslept(late)
        outcomes = self._core.step()
        touched = {id(outbox): outbox for outcome in outcomes if (outbox := self._deliver(outcome)) is not None}
        for outbox in touched.values():
            outbox.flush()
        if outcomes:  # noted once they are on their way: whoever asked waits for every hop
            asyncio.get_running_loop().call_soon(self._note, outcomes, time.time_ns())
        if self._core.executors.version != self._told_version:
            self._tell_catalog()
            self.members.tell_peers()
        if self._settling and self._core.settles_at is None:
            self._settling = False
            self.members.tell_peers()
            self._tell_catalog()
        self._set_timer()

    def _deliver(self, outcome: Outcome) -> Outbox[pb.PlaceResponse] | None:
        if isinstance(outcome, Lost):
            self._lose(outcome)
            return None
        outbox = self._outboxes.get(outcome.gateway)
        if outbox is None:
            return None
        if isinstance(outcome, Grant):
            faults.reach("scheduler.granted")
            outbox.response.granted.append(messages.lease_message(outcome))
        else:
            outbox.response.refused.append(messages.refusal_message(outcome))
        return outbox

    def _note(self, outcomes: list[Outcome], decided_at_ns: int) -> None:
        for outcome in outcomes:
            if isinstance(outcome, Lost):
                continue
            if tracing.enabled():
                _trace(outcome, decided_at_ns)
            if isinstance(outcome, Grant):
                self._note_grant(outcome)
            else:
                self._note_refusal(outcome)

    def _note_grant(self, grant: Grant) -> None:
        self._metrics.placed(grant)
        logger().debug(
            "placed",
            request_id=grant.client_request_id,
            model=grant.model,
            executor_id=grant.executor_id,
            prefill_executor_id=(grant.prefill or grant).executor_id,
            reason=grant.reason.value,
            queued_seconds=round(grant.queued_seconds, 6),
        )

    def _note_refusal(self, refused: Refused) -> None:
        self._metrics.refused(refused)
        logger().info(
            "refused",
            request_id=refused.client_request_id,
            model=refused.model[:200],
            reason=refused.reason.value,
            field=refused.field,
            queued_seconds=round(refused.queued_seconds, 6),
        )

    def _lose(self, lost: Lost) -> None:
        logger().warning("executor lost", executor_id=lost.executor_id, why=lost.why)
        for outbox in self._outboxes.values():
            outbox.response.lost_executor_ids.append(lost.executor_id)
            outbox.flush()
        self.members.lose(lost.executor_id)

    def _catalog(self) -> pb.Catalog:
        live = [description for executor, description in self.members.described() if not executor.draining]
        return pb.Catalog(executors=live, more=self._core.settles_at is not None)

    def _tell_catalog(self) -> None:
        self._told_version = self._core.executors.version
        catalog = self._catalog()
        for outbox in self._outboxes.values():
            outbox.response.catalog.CopyFrom(catalog)
            outbox.flush()

    def _set_timer(self) -> None:
        self.stop()
        times = [time for time in (self._core.next_wake(), self._core.settles_at) if time is not None]
        if times:
            self._timer = asyncio.get_running_loop().call_at(min(times), self._step)


def _trace(outcome: Grant | Refused, decided_at_ns: int) -> None:
    """The time in the queue, as a span of the request."""
    facts: dict[str, str | bool | int | float] = {"model": outcome.model}
    if isinstance(outcome, Grant):
        facts |= {
            "executor_id": outcome.executor_id,
            "prefill_executor_id": (outcome.prefill or outcome).executor_id,
            "placement_reason": outcome.reason.value,
            "expected_cached_tokens": (outcome.prefill or outcome).cached_tokens,
        }
    span = tracing.start("queue", outcome.traceparent, facts, at_ns=decided_at_ns - int(outcome.queued_seconds * 1e9))
    span.end(error=outcome.reason.value if isinstance(outcome, Refused) else None, at_ns=decided_at_ns)
