"""`penstock.internal.v1.HandoffService`: the decode side's end of the streams over which KV comes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import grpc.aio

from penstock.common import faults
from penstock.common.errors import Overloaded, Unavailable
from penstock.common.logs import logger
from penstock.common.proofs import proves
from penstock.executor.handoff.framing import Request
from penstock.executor.handoff.geometry import Geometry
from penstock.executor.handoff.handoffs import Handoffs
from penstock.executor.handoff.identity import Identity
from penstock.executor.handoff.messages import read_ask, read_attach, read_transports, tell_answer, tell_segment, tell_transports
from penstock.executor.handoff.peers import Peers
from penstock.executor.handoff.points import passed
from penstock.executor.handoff.seats import Seats
from penstock.executor.handoff.transports.negotiation import ReceivingEnds, Transports
from penstock.executor.handoff.words import Answer, Refusal, Refused
from penstock.internal.v1 import handoff_pb2 as pb

__all__ = ["Door", "HandoffServicer"]

# Answers that may wait for a sender which does not read: several for each piece of KV that can be under way.
_MOST_WAITING = 4096

_Context = grpc.aio.ServicerContext[Request, pb.HandoffResponse]


@dataclass(frozen=True, slots=True)
class Door:
    """What streams come in by, once a model is loaded."""

    identity: Identity
    geometry: Geometry
    peers: Peers
    transports: Transports
    handoffs: Handoffs


class HandoffServicer:
    """Streams of prefill executors, once `serve` has given it what they come in by."""

    def __init__(self) -> None:
        self._door: Door | None = None
        self._seats = Seats()

    def serve(self, door: Door) -> None:
        """Take streams from now on."""
        self._door = door

    async def Handoff(  # a coroutine that writes, so that a write which does not end can be given up
        self, request_iterator: AsyncIterator[Request], context: _Context
    ) -> None:
        """One prefill executor's stream."""
        door = self._door
        async with self._seats.stranger():
            request = await anext(request_iterator, None)
        if door is None:
            raise Unavailable("no model is loaded yet")
        if request is None:
            return
        first = request.message
        fault = _fault(door, first)
        if fault is not None:
            door.handoffs.counts.refusals[fault[0]] += 1
            logger().warning("a handoff stream was refused", peer=context.peer(), reason=fault[0].value, message=fault[1])
            await context.write(tell_answer(Refused(b"", 0, *fault)))
            return
        async with self._seats.of(first.introduce.executor_id) as newer:
            if not newer.is_set():
                await _serve(door, first.introduce, newer, request_iterator, context)


async def _serve(
    door: Door, sender: pb.Introduce, newer: asyncio.Event, requests: AsyncIterator[Request], context: _Context
) -> None:
    """A stream that was taken, to its end."""
    native = door.geometry.agrees(sender.native_layout)
    window = max(door.handoffs.settings.window_bytes, door.geometry.uncut(native=native))
    ends = await door.transports.receiving(window, read_transports(sender.transports))
    stream = _Stream(sender.executor_id, ends, newer, native=native)
    try:
        faults.reach("handoff.welcome")
        await context.write(_welcome(door, ends, native=native))
        door.handoffs.receiving.stream_up(stream)
        await _converse(door, stream, requests, context)
    finally:
        door.handoffs.receiving.stream_lost(stream)
        ends.close()


class _Stream:
    """A `PeerStream`. When more answers wait than the bound allows, `overflowed` is set, and no more are kept."""

    def __init__(self, executor_id: str, incoming: ReceivingEnds, newer: asyncio.Event, *, native: bool) -> None:
        self.executor_id = executor_id
        self.incoming = incoming
        self.newer = newer
        self.native = native
        self.answers: asyncio.Queue[Answer | pb.HandoffResponse] = asyncio.Queue(_MOST_WAITING)
        self.overflowed = asyncio.Event()

    def send(self, answer: Answer | pb.HandoffResponse) -> None:
        """Queue it."""
        try:
            self.answers.put_nowait(answer)
        except asyncio.QueueFull:
            self.overflowed.set()


def _fault(door: Door, first: pb.HandoffRequest) -> tuple[Refusal, str] | None:
    """Why a stream is not taken."""
    sender, own = first.introduce, door.identity
    if not first.HasField("introduce"):
        return Refusal.UNREGISTERED, "a stream begins with Introduce"
    if sender.decode_executor_id != own.executor_id:
        return Refusal.NOT_YOURS, f"this is executor {own.executor_id}"
    if door.peers.get(sender.executor_id) is None:
        return Refusal.UNREGISTERED, "the scheduler does not name the executor"
    if not proves(sender.proof, own.secret, sender.executor_id):
        return Refusal.UNREGISTERED, "it does not show what the scheduler gave that executor"
    if sender.model_fingerprint != own.model_fingerprint:
        return Refusal.WRONG_MODEL, "the two executors serve different models, or versions of one"
    return None


def _welcome(door: Door, ends: ReceivingEnds, *, native: bool) -> pb.HandoffResponse:
    settings = door.handoffs.settings
    welcome = pb.Welcome(
        executor_id=door.identity.executor_id,
        native=native,
        max_push_bytes=settings.push_bytes,
        window_bytes=ends.offer.window_bytes,
        shared_memory=tell_segment(ends.offer),
        nixl_agent=ends.offer.nixl,
        transports=tell_transports(ends.offer.transports),
    )
    return pb.HandoffResponse(welcome=welcome)


async def _converse(door: Door, stream: _Stream, requests: AsyncIterator[Request], context: _Context) -> None:
    works = (_write(stream, context), _read(door, stream, requests), _overflow(stream), _replaced(stream))
    tasks = [asyncio.create_task(work) for work in works]
    done: set[asyncio.Task[None]] = set()
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        # An exception has this frame, which must not have its task: the stream's memory would stay until a collection.
        del tasks, done, task


async def _read(door: Door, stream: _Stream, requests: AsyncIterator[Request]) -> None:
    async for request in requests:
        if request.message.HasField("attach"):
            attach = request.message.attach
            attachment = read_attach(attach)
            accepted = attachment is not None and stream.incoming.attach(attachment)
            attached = pb.Attached(transport=attach.transport, accepted=accepted)
            stream.send(pb.HandoffResponse(attached=attached))
        elif (word := read_ask(request)) is not None:
            for passing in passed(word, "received", stream.executor_id):
                door.handoffs.receiving.hear(stream, passing)


async def _replaced(stream: _Stream) -> None:
    await stream.newer.wait()


async def _overflow(stream: _Stream) -> None:
    await stream.overflowed.wait()
    logger().warning("an executor reads too slowly; its handoff stream is ended", executor_id=stream.executor_id)
    raise Overloaded("the executor reads too slowly", retry_after=1.0)


async def _write(stream: _Stream, context: _Context) -> None:
    while True:
        answer = await stream.answers.get()
        if isinstance(answer, pb.HandoffResponse):
            await context.write(answer)
            continue
        for passing in passed(answer, "sent", stream.executor_id):
            await context.write(tell_answer(passing))
