"""A scheduler over real gRPC, with gateways and executors that say what a test has them say."""

import asyncio
import contextlib
import secrets
from collections import deque

import grpc
import grpc.aio

from penstock.common.channel import connect
from penstock.internal.v1 import scheduler_pb2 as pb
from penstock.internal.v1 import scheduler_pb2_grpc as rpc
from penstock.scheduler.config import SchedulerConfig
from penstock.scheduler.server import SchedulerServer

WAIT = 10.0


class Stream:
    """One side of a bidirectional stream: `send`, and answers as they come."""

    def __init__(self, method):
        self._frames = asyncio.Queue()
        self.call = method(self._requests())

    async def _requests(self):
        while (frame := await self._frames.get()) is not None:
            yield frame

    def send(self, frame):
        self._frames.put_nowait(frame)

    async def end(self):
        self._frames.put_nowait(None)
        while await self.read() is not grpc.aio.EOF:
            pass

    async def read(self):
        async with asyncio.timeout(WAIT):
            return await self.call.read()


class Gateway(Stream):
    def __init__(self, stub):
        super().__init__(stub.Place)
        self.granted, self.refused, self.catalogs, self.lost = deque(), deque(), deque(), deque()

    async def _until(self, queue):
        while not queue:
            response = await self.read()
            assert response is not grpc.aio.EOF
            self.granted += response.granted
            self.refused += response.refused
            self.lost += response.lost_executor_ids
            if response.HasField("catalog"):
                self.catalogs.append([e.executor_id for e in response.catalog.executors])
        return queue.popleft()

    async def grant(self):
        return await self._until(self.granted)

    async def refusal(self):
        return await self._until(self.refused)

    async def loss(self):
        return await self._until(self.lost)

    async def catalog(self, *ids):
        while await self._until(self.catalogs) != list(ids):
            pass

    def place(self, request_id, **fields):
        fields = {"model": "m", "prompt_tokens": 10, "max_tokens": 5} | fields
        self.send(pb.PlaceRequest(place=[pb.Placing(request_id=request_id, **fields)]))


def description(executor_id="e1", **fields):
    given = {
        "executor_id": executor_id,
        "address": f"127.0.0.1:{9000 + sum(executor_id.encode())}",
        "model": "m",
        "context_length": 1024,
        "kv_block_size": 16,
        "kv_blocks": 1000,
        "max_batch_size": 2,
        "fields": ["sampling.temperature"],
    }
    return pb.ExecutorDescription(**given | fields)


class Executor(Stream):
    def __init__(self, stub, executor_id="e1", **fields):
        super().__init__(stub.Register)
        self.secret = secrets.token_bytes(32)
        self.send(pb.RegisterRequest(description=description(executor_id, **fields), secret=self.secret))

    async def ready(self):
        response = await self.read()
        assert response.lease_ms > 0
        assert response.HasField("peers")
        self.first_peers = ids_of(response.peers)
        return self

    async def peers(self, *ids):
        """Until it is told of exactly these."""
        while (response := await self.read()).HasField("peers") is False or ids_of(response.peers) != list(ids):
            assert response is not grpc.aio.EOF
        return response.peers.peers

    async def confirm_role(self):
        """Take on the role that is told next."""
        while not (response := await self.read()).role:
            pass
        self.send(pb.RegisterRequest(role=response.role))
        return response.role


def ids_of(peers):
    return [peer.executor_id for peer in peers.peers]


@contextlib.asynccontextmanager
async def scheduler(listen="127.0.0.1:0", **config):
    server = SchedulerServer(SchedulerConfig(listen=listen, **{"settle_seconds": 0.0, "look_ahead": 0} | config))
    try:
        yield (await server.start())["grpc"], server
    finally:
        await server.close()


@contextlib.asynccontextmanager
async def stub_of(address):
    async with connect(address) as channel:
        yield rpc.SchedulerServiceStub(channel)


@contextlib.asynccontextmanager
async def served(**config):
    async with scheduler(**config) as (address, _), stub_of(address) as stub:
        yield stub


async def states(stub):
    listed = await stub.ListExecutors(pb.ListExecutorsRequest(), timeout=WAIT, wait_for_ready=True)
    return {e.description.executor_id: e for e in listed.executors}, listed.queued


async def eventually(check):
    async with asyncio.timeout(WAIT):
        while not await check():
            pass


CALIBRATION = pb.Calibration(
    prefill=pb.StepCurve(sizes=[16, 256], seconds=[0.02, 0.2]),
    decode=pb.StepCurve(sizes=[1, 8], seconds=[0.01, 1 / 30]),
    decode_context=16,
    decode_token_seconds=1e-7,
)


HANDS_OVER = {"model_fingerprint": "v1", "features": ["export_kv", "import_kv"]}


async def pools(stub, **fields):
    """An executor that prefills, and one that decodes."""
    prefill = await Executor(stub, "p", role=pb.ROLE_PREFILL, **HANDS_OVER, **fields).ready()
    return prefill, await Executor(stub, "d", role=pb.ROLE_DECODE, **HANDS_OVER, **fields).ready()
