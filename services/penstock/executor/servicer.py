"""`penstock.internal.v1.ExecutorService`: messages in, engine calls, messages out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc.aio

from penstock.common import faults
from penstock.common.errors import Overloaded, Unavailable
from penstock.common.logs import logger
from penstock.executor.bell import Bell
from penstock.executor.engine import Engine
from penstock.executor.frame_queue import FrameQueue
from penstock.executor.messages import load_of, merge, read_start
from penstock.executor.sequence import Finish, Finished, Frame
from penstock.executor.traces import StreamTraces
from penstock.internal.v1 import executor_pb2 as pb
from penstock.internal.v1 import executor_pb2_grpc, scheduler_pb2

__all__ = ["ExecutorServicer"]

# Frames that may wait for a gateway which does not read: one of each step, so many seconds.
_MOST_WAITING = 4096


class ExecutorServicer(executor_pb2_grpc.ExecutorServiceServicer):
    """Streams of gateways over one engine, once `serve` has given it one.

    Attributes:
        failure: why the executor is NOT_SERVING; empty while it serves.
    """

    def __init__(self) -> None:
        self._serving: tuple[Engine, scheduler_pb2.ExecutorDescription, Bell] | None = None
        self.failure = ""

    def serve(self, engine: Engine, description: scheduler_pb2.ExecutorDescription) -> None:
        """Take streams from now on. In the event loop's thread."""
        self._serving = engine, description, Bell()
        self.failure = ""

    def close(self) -> None:
        """Tell streams nothing more; the engine has ended."""
        if self._serving is not None:
            self._serving[2].close()

    @property
    def _engine(self) -> Engine:
        return self._served()[0]

    @property
    def _description(self) -> scheduler_pb2.ExecutorDescription:
        return self._served()[1]

    def _served(self) -> tuple[Engine, scheduler_pb2.ExecutorDescription, Bell]:
        if self._serving is None:
            raise Unavailable(f"no model is loaded yet: {self.failure}")
        return self._serving

    async def Run(  # type: ignore[override] # a coroutine that writes, so that a write which does not end can be given up
        self, request_iterator: AsyncIterator[pb.RunRequest], context: grpc.aio.ServicerContext[pb.RunRequest, pb.RunResponse]
    ) -> None:
        """One gateway's stream; whatever ends it ends its sequences."""
        engine, _, bell = self._served()
        queue = FrameQueue(bell, _MOST_WAITING)
        traces = StreamTraces()
        writer = asyncio.create_task(_write(queue, traces, context))
        reader = asyncio.create_task(self._read(request_iterator, queue, traces))
        overflow = asyncio.create_task(queue.overflowed.wait())
        try:
            await asyncio.wait((writer, overflow), return_when=asyncio.FIRST_COMPLETED)
            if not writer.done():
                logger().warning("a gateway reads too slowly; its stream is ended", peer=context.peer())
                raise Overloaded("the gateway reads too slowly", retry_after=1.0)
            await writer
            await reader
        finally:
            for task in (writer, reader, overflow):
                task.cancel()
            engine.abort_all(queue.put)

    async def _read(self, requests: AsyncIterator[pb.RunRequest], queue: FrameQueue, traces: StreamTraces) -> None:
        try:
            async for request in requests:
                now = time.monotonic()
                for start in request.start:
                    traces.begin(start.sequence_id, start.request_id, start.traceparent)
                    self._start(start, queue, now)
                if request.aborted:
                    traces.forget(request.aborted)
                    self._engine.abort(request.aborted, queue.put)
        finally:
            queue.end()

    def _start(self, start: pb.StartSequence, queue: FrameQueue, now: float) -> None:
        if start.executor_id != self._description.executor_id:
            message = f"{start.executor_id or '(no executor_id)'} is meant, and this is {self._description.executor_id}"
            queue.put(Frame(finished=[Finished(start.sequence_id, Finish.REFUSED, message=message)]))
            return
        if start.HasField("receive"):
            faults.reach("executor.receive")
        if start.HasField("send"):
            faults.reach("executor.send")
        self._engine.submit(read_start(start, now), queue.put)

    async def GetExecutor(self, request: pb.GetExecutorRequest, context: object) -> pb.GetExecutorResponse:
        """What the executor is, how busy, and the state of every KV block; before it has loaded, what it waits for."""
        if self._serving is None:
            return pb.GetExecutorResponse(failure=self.failure)
        counts = self._engine.blocks.counts()
        return pb.GetExecutorResponse(
            description=self._description,
            load=load_of(self._engine),
            kv_blocks_used=counts.used,
            kv_blocks_cached=counts.cached,
            kv_blocks_free=counts.free,
            failure=self.failure,
        )


async def _write(queue: FrameQueue, traces: StreamTraces, context: grpc.aio.ServicerContext[pb.RunRequest, pb.RunResponse]) -> None:
    while frames := await queue.take():
        await context.write(merge(frames))
        for frame in frames:
            traces.tell(frame)
