"""Steps the core on the event loop: after inputs, once for all that came in one turn of the loop, and when a timer is due."""

from __future__ import annotations

import asyncio
import time

from penstock.common import faults, tracing
from penstock.common.errors import UnknownExecutor
from penstock.common.logs import logger
from penstock.internal.v1 import scheduler_pb2 as pb
from penstock.scheduler import messages
from penstock.scheduler.core import Scheduler
from penstock.scheduler.executors import Executor
from penstock.scheduler.metrics import SchedulerMetrics
from penstock.scheduler.model import Grant, Lost, Outcome, Refused, Role
from penstock.scheduler.outbox import Outbox

__all__ = ["Driver", "Member"]


class Member:
    """A registered executor's stream.

    Attributes:
        description: as it was told, with the role that it has now.
        outbox: what it is to be told.
        peers: those of whom it knows.
    """

    def __init__(self, description: pb.ExecutorDescription, lease_ms: int) -> None:
        self.description = description
        self.outbox = Outbox(pb.RegisterResponse)
        self.outbox.response.lease_ms = lease_ms
        self.peers: list[Executor] | None = None


class Driver:
    """Connects the core with the streams.

    Args:
        core: what decides. Its clock is the event loop's.
        metrics: where outcomes are counted.
    """

    def __init__(self, core: Scheduler, metrics: SchedulerMetrics) -> None:
        self._core = core
        self._metrics = metrics
        self._outboxes: dict[int, Outbox[pb.PlaceResponse]] = {}
        self._members: dict[Executor, Member] = {}
        self._told_version = 0
        self._kicked = False
        self._timer: asyncio.TimerHandle | None = None
        self.emptied = asyncio.Event()

    def connect(self, gateway: int) -> Outbox[pb.PlaceResponse]:
        """A gateway's stream begins; the catalog goes out first."""
        outbox = self._outboxes[gateway] = Outbox(pb.PlaceResponse)
        outbox.response.catalog.CopyFrom(self._catalog())
        outbox.flush()
        return outbox

    def disconnect(self, gateway: int) -> None:
        """It has ended."""
        del self._outboxes[gateway]

    def register(self, description: pb.ExecutorDescription, executor: Executor, lease_ms: int) -> Outbox[pb.RegisterResponse]:
        """An executor's stream begins, with its lease and its peers; it is closed when the executor is taken for lost."""
        member = self._members[executor] = Member(description, lease_ms)
        self._tell_peers(executor, member)
        member.outbox.flush()
        logger().info(
            "executor joined",
            executor_id=description.executor_id,
            model=description.model,
            address=description.address,
            role=executor.role.value,
        )
        return member.outbox

    def set_role(self, executor_id: str, role: Role) -> None:
        """Have an executor take on another role.

        Raises:
            UnknownExecutor: none of this id lives.
        """
        executor = self._core.executors.get(executor_id)
        member = None if executor is None else self._members.get(executor)
        if member is None:
            raise UnknownExecutor(f"no live executor has the id {executor_id[:200]!r}")
        member.outbox.response.role = messages.role_message(role)
        member.outbox.flush()
        logger().info("role given", executor_id=executor_id, role=role.value)

    def unregister(self, executor: Executor) -> None:
        """It has ended."""
        del self._members[executor]

    def kick(self) -> None:
        """Step soon: once, however many inputs come before."""
        if not self._kicked:
            self._kicked = True
            asyncio.get_running_loop().call_soon(self._step)

    def stop(self) -> None:
        """No timer fires any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def list_executors(self) -> pb.ListExecutorsResponse:
        """All that live, those that drain too."""
        states = [
            pb.ExecutorState(
                description=self._described(executor),
                load=messages.load_message(executor),
                draining=executor.draining,
                leases=executor.hold.leases,
                prefill_leases=executor.hold.prefill_leases,
            )
            for executor in self._core.executors
            if executor in self._members
        ]
        return pb.ListExecutorsResponse(executors=states, queued=self._core.queued)

    def _step(self) -> None:
        self._kicked = False
        outcomes = self._core.step()
        touched = {id(outbox): outbox for outcome in outcomes if (outbox := self._deliver(outcome)) is not None}
        for outbox in touched.values():
            outbox.flush()
        if self._core.executors.version != self._told_version:
            self._tell_catalog()
            for executor, member in self._members.items():
                self._tell_peers(executor, member)
        (self.emptied.clear if self._core.queued else self.emptied.set)()
        self._set_timer()

    def _deliver(self, outcome: Outcome) -> Outbox[pb.PlaceResponse] | None:
        if isinstance(outcome, Lost):
            self._lose(outcome)
            return None
        if tracing.enabled():
            _trace(outcome)
        outbox = self._outboxes.get(outcome.gateway)
        if isinstance(outcome, Grant):
            self._note_grant(outcome)
            if outbox is not None:
                faults.reach("scheduler.granted")
                outbox.response.granted.append(messages.lease_message(outcome))
        else:
            self._note_refusal(outcome)
            if outbox is not None:
                outbox.response.refused.append(messages.refusal_message(outcome))
        return outbox

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
        for executor, member in self._members.items():
            if executor.description.executor_id == lost.executor_id:
                member.outbox.close()

    def _catalog(self) -> pb.Catalog:
        live = (e for e in self._core.executors if not e.draining)
        return pb.Catalog(executors=[self._described(e) for e in live if e in self._members])

    def _described(self, executor: Executor) -> pb.ExecutorDescription:
        description = self._members[executor].description
        description.role = messages.role_message(executor.role)
        return description

    def _tell_peers(self, executor: Executor, member: Member) -> None:
        peers = self._core.executors.peers(executor)
        if peers != member.peers:
            member.peers = peers
            member.outbox.response.peers.CopyFrom(messages.peers_message(peers))
            member.outbox.flush()

    def _tell_catalog(self) -> None:
        self._told_version = self._core.executors.version
        catalog = self._catalog()
        for outbox in self._outboxes.values():
            outbox.response.catalog.CopyFrom(catalog)
            outbox.flush()

    def _set_timer(self) -> None:
        self.stop()
        wake = self._core.next_wake()
        if wake is not None:
            self._timer = asyncio.get_running_loop().call_at(wake, self._step)


def _trace(outcome: Grant | Refused) -> None:
    """The time in the queue, as a span of the request that has ended now."""
    now = time.time_ns()
    facts: dict[str, str | bool | int | float] = {"model": outcome.model}
    if isinstance(outcome, Grant):
        facts |= {
            "executor_id": outcome.executor_id,
            "prefill_executor_id": (outcome.prefill or outcome).executor_id,
            "placement_reason": outcome.reason.value,
            "expected_cached_tokens": outcome.cached_tokens,
        }
    span = tracing.start("queue", outcome.traceparent, facts, at_ns=now - int(outcome.queued_seconds * 1e9))
    span.end(error=outcome.reason.value if isinstance(outcome, Refused) else None, at_ns=now)
