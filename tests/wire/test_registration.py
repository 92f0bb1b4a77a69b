"""How an executor comes back to a scheduler that was away."""

import asyncio
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
    return lambda scheduler: registration.Registration(scheduler, DESCRIPTION, engine, lambda: True, lambda: "", exchange)


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
