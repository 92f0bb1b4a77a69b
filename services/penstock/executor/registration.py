"""Keeps the scheduler told: what this executor is, how busy it is, and which prefixes it has cached."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from typing import Any

import grpc.aio

from penstock.common.channel import connect, leave, why_ended
from penstock.common.logs import logger
from penstock.executor.engine import Engine
from penstock.executor.handoff.exchange import Exchange
from penstock.executor.handoff.peers import Peer
from penstock.executor.messages import kv_events, load_of
from penstock.internal.v1 import scheduler_pb2, scheduler_pb2_grpc

__all__ = ["Registration"]

_TICK_SECONDS = 0.25
_LONGEST_HEARTBEAT = 1.0
_HEARTBEATS_PER_LEASE = 3
_FIRST_BACK_OFF = 0.1
_LAST_BACK_OFF = 1.0
_FAREWELL_SECONDS = 2.0


class Registration:
    """A `Register` stream that is made again whenever it is lost, and left while the executor is not healthy."""

    def __init__(
        self,
        scheduler: str,
        description: scheduler_pb2.ExecutorDescription,
        engine: Engine,
        healthy: Callable[[], bool],
        why: Callable[[], str],
        exchange: Exchange,
        tick_seconds: float = _TICK_SECONDS,
    ) -> None:
        self._scheduler = scheduler
        self._description = description
        self._engine = engine
        self._healthy = healthy
        self._why = why
        self._exchange = exchange
        self._tick = tick_seconds
        self._heartbeat = _LONGEST_HEARTBEAT
        self._changed = asyncio.Event()
        self.registered = asyncio.Event()
        self._left = asyncio.Event()

    def drain(self) -> None:
        """Tell the scheduler at once that the engine drains."""
        self._changed.set()

    async def leave(self, seconds: float) -> None:
        """Return when the scheduler has heard that this executor is not healthy any more, or after so many seconds."""
        self._changed.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._left.wait(), seconds if self.registered.is_set() else 0)

    async def run(self) -> None:
        """Stay registered until cancelled."""
        async with connect(self._scheduler) as channel:
            stub = scheduler_pb2_grpc.SchedulerServiceStub(channel)
            back_off = _FIRST_BACK_OFF
            while True:
                # While the scheduler is away gRPC alone decides when to try again: two pauses, each grown over the same absence,
                # would outlast the time that a new scheduler waits for its executors.
                await channel.channel_ready()
                if self._healthy():
                    try:
                        await self._report(stub)
                    except grpc.aio.AioRpcError as error:
                        # One that never was there is waited for; one that refuses has a reason.
                        if self.registered.is_set() or error.code() is not grpc.StatusCode.UNAVAILABLE:
                            self._tell_lost(why_ended(error))
                    except asyncio.InvalidStateError:  # what a write raises on a stream that has ended meanwhile
                        if self.registered.is_set():
                            self._tell_lost("the stream ended")
                if self.registered.is_set():
                    self.registered.clear()
                    back_off = _FIRST_BACK_OFF
                # Spread out, so that a scheduler that comes back does not see all executors in one moment.
                await asyncio.sleep(back_off * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
                back_off = min(2 * back_off, _LAST_BACK_OFF)

    def kept(self) -> bool:
        """Whether the scheduler has this executor, or need not have it: one that is not healthy stays away."""
        return self.registered.is_set() or not self._healthy()

    def _tell_lost(self, why: str) -> None:
        logger().warning("scheduler lost", scheduler=self._scheduler, why=why)

    async def _report(self, stub: Any) -> None:
        """One stream, until it is lost or the executor is not healthy."""
        self._left.clear()  # an engine that was stalled before may yet die
        call = stub.Register()
        listening = asyncio.create_task(self._listen(call))
        try:
            log = self._engine.blocks.log
            last = self._load()
            draining, role = self._engine.draining, self._description.role
            first = scheduler_pb2.RegisterRequest(
                description=self._description,
                load=last,
                kv_events=kv_events(log.snapshot()),
                draining=draining,
                secret=self._exchange.door.identity.secret,
            )
            await call.write(first)
            clock = asyncio.get_running_loop().time
            told_at = clock()
            while self._healthy() and not listening.done():
                await self._next_tick(listening)
                load, changes, now = self._load(), log.take(), (self._engine.draining, self._description.role)
                if load == last and changes is None and now == (draining, role) and clock() - told_at < self._heartbeat:
                    continue
                told_role = scheduler_pb2.ROLE_UNSPECIFIED if now[1] == role else now[1]
                last, (draining, role), told_at = load, now, clock()
                events = None if changes is None else kv_events(changes)
                message = scheduler_pb2.RegisterRequest(load=load, kv_events=events, draining=draining, role=told_role)
                await call.write(message)
            if listening.done():
                listening.result()
            else:
                await self._tell_stalled(call, listening)
        finally:
            listening.cancel()
            leave(call)

    async def _tell_stalled(self, call: Any, listening: asyncio.Task[None]) -> None:
        """Have what runs here placed elsewhere. The scheduler ends the stream once it has heard."""
        await call.write(scheduler_pb2.RegisterRequest(stalled=True, failure=self._why()))
        await call.done_writing()
        await asyncio.wait((listening,), timeout=_FAREWELL_SECONDS)
        self._left.set()

    async def _next_tick(self, listening: asyncio.Task[None]) -> None:
        changed = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait((changed, listening), timeout=min(self._tick, self._heartbeat), return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
        self._changed.clear()

    async def _listen(self, call: Any) -> None:
        async for response in call:
            if response.lease_ms:
                self._heartbeat = min(_LONGEST_HEARTBEAT, response.lease_ms / 1000 / _HEARTBEATS_PER_LEASE)
                self._changed.set()  # a wait that has begun would be too long
            if response.HasField("peers"):
                named = response.peers
                peers = (Peer(peer.executor_id, peer.address, peer.model_fingerprint, peer.proof) for peer in named.peers)
                self._exchange.peers.update(peers, more=named.more)
            if response.role not in {scheduler_pb2.ROLE_UNSPECIFIED, self._description.role}:
                self._take_on(response.role)
            if not self.registered.is_set():
                logger().info("registered", scheduler=self._scheduler, executor_id=self._description.executor_id)
                self.registered.set()

    def _take_on(self, role: scheduler_pb2.Role.ValueType) -> None:
        """The role is told back at once, and again to a scheduler that has been started anew."""
        self._description.role = role
        logger().info("role taken on", role=scheduler_pb2.Role.Name(role).removeprefix("ROLE_").lower())
        self._changed.set()

    def _load(self) -> scheduler_pb2.Load:
        load = load_of(self._engine)
        counts, now = self._exchange.handoffs.counts, asyncio.get_running_loop().time()
        load.handoff_bytes_per_second = counts.bytes_per_second(now)
        load.failing.extend(
            scheduler_pb2.FailingPeer(executor_id=peer.executor_id, sends=peer.sends, failures=peer.failures)
            for peer in counts.failing.lately(now)
        )
        return load
