"""The streams of registered executors: what each has told of itself, and what it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from penstock.common.errors import UnknownExecutor
from penstock.common.logs import logger
from penstock.common.proofs import proof
from penstock.internal.v1 import scheduler_pb2 as pb
from penstock.scheduler import messages
from penstock.scheduler.executors import Executor
from penstock.scheduler.model import Role
from penstock.scheduler.outbox import Outbox
from penstock.scheduler.registry import Registry

__all__ = ["Members"]


class _Member:
    def __init__(self, description: pb.ExecutorDescription, secret: bytes, lease_ms: int) -> None:
        self.description = description
        self.secret = secret
        self.outbox = Outbox(pb.RegisterResponse)
        self.outbox.response.lease_ms = lease_ms
        self.peers: tuple[list[Executor], bool] | None = None


class Members:
    """Executors of the registry that have a stream.

    Args:
        settling: whether executors may still have to register since the scheduler's start.

    Attributes:
        ended: set when `end` was called and no executor's stream is left.
    """

    def __init__(self, executors: Registry, settling: Callable[[], bool]) -> None:
        self._executors = executors
        self._settling = settling
        self._members: dict[Executor, _Member] = {}
        self._ending = False
        self.ended = asyncio.Event()

    def join(self, first: pb.RegisterRequest, executor: Executor, lease_ms: int) -> Outbox[pb.RegisterResponse]:
        """An executor's stream begins, with its lease and its peers; it is closed when the executor is taken for lost."""
        description = first.description
        member = self._members[executor] = _Member(description, first.secret, lease_ms)
        self._tell_peers(executor, member)
        member.outbox.flush()
        if self._ending:
            member.outbox.close()
        logger().info(
            "executor joined",
            executor_id=description.executor_id,
            model=description.model,
            address=description.address,
            role=executor.role.value,
        )
        return member.outbox

    def leave(self, executor: Executor) -> None:
        """It has ended."""
        del self._members[executor]
        self._note_end()

    def end(self) -> None:
        """Have the streams end: what runs on the executors goes on without."""
        self._ending = True
        for member in self._members.values():
            member.outbox.close()
        self._note_end()

    def lose(self, executor_id: str) -> None:
        """An executor is taken for lost."""
        for executor, member in self._members.items():
            if executor.description.executor_id == executor_id:
                member.outbox.close()

    def set_role(self, executor_id: str, role: Role) -> None:
        """Have an executor take on another role.

        Raises:
            UnknownExecutor: none of this id lives.
        """
        executor = self._executors.get(executor_id)
        member = None if executor is None else self._members.get(executor)
        if member is None:
            raise UnknownExecutor(f"no live executor has the id {executor_id[:200]!r}")
        member.outbox.response.role = messages.role_message(role)
        member.outbox.flush()
        logger().info("role given", executor_id=executor_id, role=role.value)

    def tell_peers(self) -> None:
        """Executors came or left, or the scheduler has settled: tell those whose peers are others now."""
        for executor, member in self._members.items():
            self._tell_peers(executor, member)

    def described(self) -> Iterator[tuple[Executor, pb.ExecutorDescription]]:
        """All that live, with what they are and the role that each has now."""
        for executor in self._executors:
            member = self._members.get(executor)
            if member is not None:
                member.description.role = messages.role_message(executor.role)
                yield executor, member.description

    def _note_end(self) -> None:
        if self._ending and not self._members:
            self.ended.set()

    def _tell_peers(self, executor: Executor, member: _Member) -> None:
        peers, settling = self._executors.peers(executor), self._settling()
        if (peers, settling) != member.peers:
            member.peers = peers, settling
            own_id = executor.description.executor_id
            proven = ((peer, self._proof(peer, own_id)) for peer in peers)
            member.outbox.response.peers.CopyFrom(messages.peers_message(proven, more=settling))
            member.outbox.flush()

    def _proof(self, peer: Executor, own_id: str) -> bytes:
        member = self._members.get(peer)
        return proof(member.secret, own_id) if member is not None and member.secret else b""
