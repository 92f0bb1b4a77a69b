"""How an executor comes back to a scheduler that was away."""

import asyncio
from contextlib import asynccontextmanager
from types import SimpleNamespace

import pytest

from penstock.executor import registration
from penstock.internal.v1 import scheduler_pb2 as pb
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.server import SchedulerServer

DESCRIPTION = pb.ExecutorDescription(
    executor_id="e", address="127.0.0.1:1", model="m", context_length=16, kv_block_size=1, kv_blocks=16, max_batch_size=1
)


@pytest.fixture
def executor(monkeypatch):
    """A registration without an engine: what it tells of one is nothing."""
    monkeypatch.setattr(registration.Registration, "_load", lambda _: pb.Load())
    monkeypatch.setattr(registration, "kv_events", lambda _: pb.KvEvents(cleared=True))
    log = SimpleNamespace(snapshot=lambda: None, take=lambda: None)
    engine = SimpleNamespace(blocks=SimpleNamespace(log=log), draining=False)
    identity = SimpleNamespace(secret=b"s")
    peers = SimpleNamespace(update=lambda *_, **__: None)
    exchange = SimpleNamespace(door=SimpleNamespace(identity=identity), peers=peers)

    def made(scheduler, healthy=lambda: True, why=lambda: ""):
        return registration.Registration(scheduler, DESCRIPTION, engine, healthy, why, exchange)

    return made


async def test_executor_registers_as_soon_as_there_is_a_connection(executor, monkeypatch):
    """However long its own pauses have become, and however often it was turned away before."""
    monkeypatch.setattr(registration, "_FIRST_BACK_OFF", 1e6)
    turned_away = asyncio.Event()

    async def turn_away(_, writer):
        turned_away.set()
        writer.transport.abort()

    absent = await asyncio.start_server(turn_away, "127.0.0.1", 0)
    address = f"127.0.0.1:{absent.sockets[0].getsockname()[1]}"
    mine = executor(address)
    running = asyncio.create_task(mine.run())
    scheduler = SchedulerServer(SchedulerConfig(listen=address))
    try:
        async with asyncio.timeout(20):
            await turned_away.wait()
            absent.close()
            await absent.wait_closed()
            await scheduler.start()
            await mine.registered.wait()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await scheduler.close()


class Stream:
    """Of a scheduler that names the executor at once, and ends the stream when it is let."""

    def __init__(self):
        self.told = []
        self.farewell = asyncio.Event()
        self.ended = asyncio.Event()
        self._cython_call = SimpleNamespace(cancel=lambda _: None)

    async def __aiter__(self):
        yield pb.RegisterResponse(lease_ms=5000)
        await self.ended.wait()

    async def write(self, request):
        self.told.append(request)

    async def done_writing(self):
        self.farewell.set()

    def cancel(self):
        self.ended.set()


async def test_an_engine_that_was_stalled_and_later_dies_stays_until_the_scheduler_has_heard_why(executor, monkeypatch):
    streams, healthy, why = asyncio.Queue(), [True], ["stalled"]

    def register():
        streams.put_nowait(stream := Stream())
        return stream

    @asynccontextmanager
    async def connect(_):
        yield SimpleNamespace(channel_ready=lambda: asyncio.sleep(0))

    monkeypatch.setattr(registration, "connect", connect)
    monkeypatch.setattr(registration.scheduler_pb2_grpc, "SchedulerServiceStub", lambda _: SimpleNamespace(Register=register))
    monkeypatch.setattr(registration, "_FAREWELL_SECONDS", 1e6)
    mine = executor("scheduler", lambda: healthy[0], lambda: why[0])
    running = asyncio.create_task(mine.run())
    try:
        async with asyncio.timeout(20):
            stalled = await streams.get()
            await mine.registered.wait()
            healthy[0] = False
            await stalled.farewell.wait()
            stalled.ended.set()
            healthy[0] = True
            dying = await streams.get()
            await mine.registered.wait()
            healthy[0], why[0] = False, "dead"
            leaving = asyncio.create_task(mine.leave(1e6))
            await dying.farewell.wait()
            for _ in range(10):  # turns of the loop, in which one that waits for nothing returns
                await asyncio.sleep(0)
            assert dying.told[-1].failure == "dead"
            assert not leaving.done()
            dying.ended.set()
            await leaving
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
