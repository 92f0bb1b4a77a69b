"""The prefill side's end of the streams over which KV goes: one to each decode executor, opened when a handoff needs it."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc
import grpc.aio

from penstock.common import faults
from penstock.common.channel import connect, leave, why_ended
from penstock.common.handoff import HandoffFailure
from penstock.common.logs import logger
from penstock.executor.handoff.framing import Request, open_stream
from penstock.executor.handoff.geometry import Geometry
from penstock.executor.handoff.identity import Identity
from penstock.executor.handoff.line import Agreed, Line
from penstock.executor.handoff.messages import read_answer, read_offer, refusal_of, tell_ask, tell_attach, tell_transports
from penstock.executor.handoff.peers import Peer, Peers
from penstock.executor.handoff.points import passed
from penstock.executor.handoff.transports.negotiation import SendingEnds, Transports
from penstock.executor.handoff.transports.sizes import best, fits
from penstock.executor.handoff.words import Refusal
from penstock.internal.v1 import handoff_pb2 as pb

__all__ = ["Links"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 0.5
_IDLE_SECONDS = 30.0


class _Refused(Exception):
    """The other side did not take the stream."""

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Links:
    """Keeps a stream for every line that is busy, and for a while after. Of one event loop.

    Args:
        patience: seconds that the other side has to answer to an Introduce.
    """

    def __init__(self, identity: Identity, geometry: Geometry, peers: Peers, transports: Transports, patience: float) -> None:
        self._identity = identity
        self._geometry = geometry
        self._peers = peers
        self._transports = transports
        self._patience = patience
        self._tasks: dict[Line, asyncio.Task[None]] = {}

    def dial(self, line: Line) -> None:
        """Keep a stream for it, if none is kept already."""
        if line not in self._tasks:
            self._tasks[line] = asyncio.get_running_loop().create_task(self._run(line))

    async def close(self) -> None:
        """End all streams."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, line: Line) -> None:
        try:
            await self._keep(line)
        finally:  # at once: between this and the line's last look at itself nobody can have dialled in vain
            del self._tasks[line]

    async def _keep(self, line: Line) -> None:
        pause = _FIRST_PAUSE
        while line.busy:
            peer = self._peers.get(line.executor_id)
            if peer is None:
                line.lost(HandoffFailure.UNKNOWN_PEER, "the scheduler does not name the decode executor")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._peers.change(), _LONGEST_PAUSE)
                continue
            failure, why, heard = await self._stream(line, peer)
            if failure is None:
                continue
            tell = logger().warning if line.senders else logger().info  # an executor that leaves as planned ends its streams
            tell("handoff stream lost", executor_id=line.executor_id, address=peer.address, why=why)
            pause = _FIRST_PAUSE if heard else min(2 * pause, _LONGEST_PAUSE)
            await asyncio.sleep(pause)

    async def _stream(self, line: Line, peer: Peer) -> tuple[HandoffFailure | None, str, bool]:
        """One stream, to its end: why it ended (None: nobody needs it), and whether it was ever welcome."""
        failure, why, heard = HandoffFailure.LEASE_EXPIRED, "the stream ended", False
        ends: SendingEnds | None = None
        async with connect(peer.address) as channel:
            call = open_stream(channel)
            try:
                async with asyncio.timeout(self._patience) as patience:
                    welcome = await self._introduce(call, line, peer)
                    ends = self._transports.sending(read_offer(welcome))
                    patience.reschedule(asyncio.get_running_loop().time() + self._patience + ends.patience)
                    await _attach(call, ends)
                heard = True
                line.opened(_agreed(ends, welcome, self._geometry))
                if await self._converse(call, line):
                    return None, "", True
            except _Refused as error:
                why = f"{error.reason.value}: {error}"
                if error.reason is Refusal.WRONG_MODEL:
                    line.unreachable(HandoffFailure.INCOMPATIBLE, why)
                elif error.reason is Refusal.UNREGISTERED:
                    failure = HandoffFailure.UNKNOWN_PEER
            except grpc.aio.AioRpcError as error:
                why = why_ended(error)
            except (asyncio.InvalidStateError, TimeoutError):
                why = "the other side ended the stream, or does not answer"
            except Exception as error:  # noqa: BLE001 - an executor that breaks the protocol is lost, and no more
                logger().error("handoff stream broke", executor_id=line.executor_id, exc_info=error)
                why = type(error).__name__
            finally:
                line.lost(failure, why)
                leave(call)
                if ends is not None:
                    ends.close()
        return failure, why, heard

    async def _introduce(self, call: Any, line: Line, peer: Peer) -> pb.Welcome:
        own = self._identity
        introduce = pb.Introduce(
            executor_id=own.executor_id,
            decode_executor_id=line.executor_id,
            model_fingerprint=own.model_fingerprint,
            native_layout=own.native_layout,
            transports=tell_transports(self._transports.names),
            proof=peer.proof,
        )
        faults.reach("handoff.introduce")
        await call.write(Request(pb.HandoffRequest(introduce=introduce)))
        answer = await _read(call)
        if answer.HasField("refused"):
            raise _Refused(refusal_of(answer.refused.reason), answer.refused.message)
        if answer.welcome.executor_id != line.executor_id:
            raise _Refused(Refusal.NOT_YOURS, "another executor answers at that address")
        return answer.welcome

    async def _converse(self, call: Any, line: Line) -> bool:
        """Say what the line has to say, and hear, until the stream is lost; True: until nobody has needed it for a while."""
        tasks = [asyncio.create_task(work) for work in (_write(call, line), _hear(call, line), _stuck(line))]
        done: set[asyncio.Task[None]] = set()
        try:
            while True:
                done, _ = await asyncio.wait(tasks, timeout=_IDLE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                if done or not line.busy:
                    return not done
        finally:
            for task in tasks:
                task.cancel()
            # An exception has this frame, which must not have its task: call and connection would stay until a collection.
            del tasks, done, task


def _agreed(ends: SendingEnds, welcome: pb.Welcome, geometry: Geometry) -> Agreed:
    push_bytes, window_bytes = best(ends.transport, welcome.max_push_bytes, welcome.window_bytes)
    native = welcome.native and fits(ends.transport, geometry.uncut(native=True))
    return Agreed(ends, native, max(1, push_bytes), max(1, window_bytes))


async def _attach(call: Any, ends: SendingEnds) -> None:
    while (attachment := await ends.attach()) is not None:
        faults.reach("handoff.attach")
        await call.write(tell_attach(attachment))
        ends.attached(accepted=(await _read(call)).attached.accepted)


async def _read(call: Any) -> pb.HandoffResponse:
    answer = await call.read()
    if not isinstance(answer, pb.HandoffResponse):
        raise asyncio.InvalidStateError  # the end of the stream
    return answer


async def _hear(call: Any, line: Line) -> None:
    while True:
        answer = read_answer(await _read(call))
        if answer is None:
            continue
        for passing in passed(answer, "received", line.executor_id):
            line.hear(passing)


async def _stuck(line: Line) -> None:
    await line.stuck.wait()


async def _write(call: Any, line: Line) -> None:
    while True:
        line.wanted.clear()
        while (word := line.next_message()) is not None:
            for passing in passed(word, "sent", line.executor_id):
                await call.write(tell_ask(passing))
        await line.wanted.wait()
