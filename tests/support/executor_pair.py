"""Two executors over real gRPC, and what a gateway does between them: the decode half first, the prefill half on its ticket."""

from contextlib import AsyncExitStack, asynccontextmanager

import grpc.aio

from penstock.common.channel import connect
from penstock.common.proofs import proof
from penstock.executor.config import ExecutorConfig
from penstock.executor.handoff.peers import Peer
from penstock.executor.server import ExecutorServer
from penstock.internal.v1 import executor_pb2 as pb
from penstock.internal.v1 import executor_pb2_grpc


class Side:
    """One executor, and a gateway's stream to it."""

    def __init__(self, server, stub, description):
        self.server, self.stub, self.description = server, stub, description
        self.call = stub.Run()
        self.tokens, self.finished, self.arrived, self.tickets = {}, {}, {}, {}

    @property
    def id(self):
        return self.description.executor_id

    @property
    def secret(self):
        return self.server._exchange.door.identity.secret

    def as_peer_of(self, other):
        """What the scheduler tells the other of it."""
        return Peer(self.id, self.description.address, self.description.model_fingerprint, proof(self.secret, other.id))

    @property
    def handoffs(self):
        return self.server._exchange.handoffs

    def know(self, *others):
        """The scheduler's word."""
        self.server._exchange.peers.update(other.as_peer_of(self) for other in others)

    async def start(self, sequence_id, prompt, max_tokens, **fields):
        fields = {"sequence_id": sequence_id, "prompt_ids": prompt, "max_tokens": max_tokens} | fields
        await self.call.write(pb.RunRequest(start=[pb.StartSequence(executor_id=self.id, **fields)]))

    async def until(self, ready):
        """Read what the executor tells until `ready()`."""
        while not ready():
            response = await self.call.read()
            assert response is not grpc.aio.EOF
            for sequence_id, token, position in zip(response.sequence_ids, response.token_ids, response.positions, strict=True):
                self.tokens.setdefault(sequence_id, {})[position] = token
            self.tickets |= {told.sequence_id: told.ticket for told in response.reserved}
            self.arrived |= {told.sequence_id: told for told in response.arrived}
            self.finished |= {told.sequence_id: told for told in response.finished}

    async def state(self):
        return await self.stub.GetExecutor(pb.GetExecutorRequest())

    async def idle(self):
        """Wait until no block is used."""
        state = await self.state()
        while state.kv_blocks_used or state.load.running or state.load.receiving or state.load.sending:
            state = await self.state()
        assert state.kv_blocks_cached + state.kv_blocks_free == self.description.kv_blocks


@asynccontextmanager
async def executor(**settings):
    """An executor that listens, and a gateway's stream to it."""
    server = ExecutorServer(ExecutorConfig(**{"model": "builtin", "backend": "fake", "listen": "127.0.0.1:0"} | settings))
    try:
        address = (await server.start())["grpc"]
        async with connect(address) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            side = Side(server, stub, (await stub.GetExecutor(pb.GetExecutorRequest(), wait_for_ready=True)).description)
            yield side
            side.call.cancel()
    finally:
        await server.close()


@asynccontextmanager
async def executor_pair(prefill=None, decode=None, **settings):
    """One that prefills and one that decodes, which know each other."""
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(executor(**settings | (prefill or {})))
        other = await stack.enter_async_context(executor(**settings | (decode or {})))
        one.know(other)
        other.know(one)
        yield one, other


async def hand_over(prefill, decode, sequence_id, prompt, max_tokens, **fields):
    """One sequence apart, to its end."""
    await decode.start(sequence_id, prompt, max_tokens, receive=pb.ReceiveKv(prefill_executor_id=prefill.id), **fields)
    await decode.until(lambda: sequence_id in decode.tickets)
    await prefill.start(sequence_id, prompt, max_tokens, send=pb.SendKv(ticket=decode.tickets[sequence_id]), **fields)
    await prefill.until(lambda: sequence_id in prefill.finished)
    if prefill.finished[sequence_id].reason not in {pb.SEQUENCE_FINISH_STOP, pb.SEQUENCE_FINISH_LENGTH}:
        await decode.until(lambda: sequence_id in decode.finished)
    return [token for _, token in sorted((prefill.tokens.get(sequence_id, {}) | decode.tokens.get(sequence_id, {})).items())]
